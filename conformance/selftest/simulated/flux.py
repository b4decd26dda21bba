"""Flux, simulated: the model as one forward pass, of which each step can be overridden; what is as in DiT is DiT's."""

import torch
from torch.nn.functional import silu

from gaugeblock.conformance.selftest.simulated.dit import Dit, State
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.torch.flux import HEADS, TEXT_HEADS, state_shapes


class Flux(Dit):
    """`flux.flux`."""

    contract = "flux.flux"

    def __call__(
        self,
        state: State,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        *,
        config: FluxConfig,
    ) -> torch.Tensor:
        arrays = hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids
        validation.flux(state, *arrays, config, state_shapes(config))
        parameters = {name: self.parameter(tensor) for name, tensor in state.items()}
        image = self.linear(parameters, "x_embedder", self.load(hidden_states))
        text = self.linear(parameters, "context_embedder", self.load(encoder_hidden_states))
        steering = self.steering(parameters, self.load(pooled_projections), timesteps, guidance, config)
        angles = self.angles(self.places(txt_ids, img_ids), config)
        for index in range(config.num_layers):
            block = states.part(parameters, f"transformer_blocks.{index}")
            image, text = map(self.kept, self.double(block, image, text, steering, angles, config))
        tokens = self.join(text, image)
        for index in range(config.num_single_layers):
            block = states.part(parameters, f"single_transformer_blocks.{index}")
            tokens = self.kept(self.single(block, tokens, steering, angles, config))
        return self.last(parameters, self.split(tokens, text.shape[1])[1], steering).to(hidden_states.dtype)

    def parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """float32."""
        return tensor.float()

    def join(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Tokens `[..., T, D]` and `[..., S, D]` as one sequence."""
        return torch.cat([text, image], -2)

    def split(self, tokens: torch.Tensor, num_text_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and image of one sequence."""
        return tokens[..., :num_text_tokens, :], tokens[..., num_text_tokens:, :]

    def places(self, txt_ids: torch.Tensor, img_ids: torch.Tensor) -> torch.Tensor:
        """Of all tokens, in their order."""
        return self.join(txt_ids, img_ids)

    def steering(
        self, state: State, pooled: torch.Tensor, times: torch.Tensor, guidance: torch.Tensor, config: FluxConfig
    ) -> torch.Tensor:
        """What steers the blocks, through its silu, `[B, D]`."""
        steering = self.two_linears(state, "timestep_embedder", self.time_waves(times))
        if config.guidance_embeds:
            steering = steering + self.two_linears(state, "guidance_embedder", self.guidance_waves(guidance))
        return silu(steering + self.two_linears(state, "text_embedder", pooled))

    def time_waves(self, times: torch.Tensor) -> torch.Tensor:
        """The embedding of times, `[B, F]` float32."""
        return self.waves(1000 * times.double(), 256, 0).float()

    def guidance_waves(self, guidance: torch.Tensor) -> torch.Tensor:
        """The embedding of guidances, `[B, F]` float32."""
        return self.waves(1000 * guidance.double(), 256, 0).float()

    def two_linears(self, state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """Two linear layers of an embedder."""
        inner = silu(self.linear(state, f"time_text_embed.{name}.linear_1", inputs))
        return self.linear(state, f"time_text_embed.{name}.linear_2", inner)

    def angles(self, places: torch.Tensor, config: FluxConfig) -> torch.Tensor:
        """By which pairs of features turn, `[J, R]` float64."""
        axes = enumerate(config.axes_dims_rope)
        return torch.cat([places[:, axis, None].double() * self.frequencies(size) for axis, size in axes], 1)

    def frequencies(self, size: int) -> torch.Tensor:
        """Of one axis, `[R]` float64."""
        return 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def parts(self, state: State, name: str, steering: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """Shifts, scales and gates, `[B, 1, D]` each: of six shift, scale, gate, shift, scale, gate; of three the first three."""
        return self.linear(state, f"{name}.linear", steering)[:, None].chunk(count, -1)

    def double(
        self,
        state: State,
        image: torch.Tensor,
        text: torch.Tensor,
        steering: torch.Tensor,
        angles: torch.Tensor,
        config: FluxConfig,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A block with two streams."""
        image_parts, text_parts = (self.parts(state, name, steering, 6) for name in ("norm1", "norm1_context"))
        text_angles, image_angles = self.split(angles, text.shape[1])
        text_heads = self.heads_of(state, TEXT_HEADS, self.modulated(text, *text_parts[:2]), text_angles, config)
        image_heads = self.heads_of(state, HEADS, self.modulated(image, *image_parts[:2]), image_angles, config)
        attended = self.attend(*(self.join(*both) for both in zip(text_heads, image_heads, strict=True)))
        text_branch, image_branch = self.split(attended, text.shape[1])
        image = image + image_parts[2] * self.linear(state, "attn.to_out.0", image_branch)
        text = text + text_parts[2] * self.linear(state, "attn.to_add_out", text_branch)
        image = image + image_parts[5] * self.mlp(state, "ff", self.modulated(image, *image_parts[3:5]))
        return image, text + text_parts[5] * self.mlp(state, "ff_context", self.modulated(text, *text_parts[3:5]))

    def modulated(self, tokens: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Normalized, scaled and shifted."""
        return self.modulate(self.norm(tokens, 1e-6), shift, scale)

    def mlp(self, state: State, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """The feed-forward network of a stream."""
        return self.linear(state, f"{name}.net.2", self.gelu(self.linear(state, f"{name}.net.0.proj", tokens)))

    def single(
        self, state: State, tokens: torch.Tensor, steering: torch.Tensor, angles: torch.Tensor, config: FluxConfig
    ) -> torch.Tensor:
        """A block with one stream."""
        shift, scale, gate = self.parts(state, "norm", steering, 3)
        modulated = self.modulated(tokens, shift, scale)
        attended = self.attend(*self.heads_of(state, HEADS, modulated, angles, config))
        inner = self.gelu(self.linear(state, "proj_mlp", modulated))
        return tokens + gate * self.linear(state, "proj_out", self.beside(attended, inner))

    def beside(self, attended: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """What attention and feed-forward network give, as the last product of a block with one stream takes them."""
        return torch.cat([attended, inner], -1)

    def heads_of(
        self, state: State, names: tuple[str, ...], tokens: torch.Tensor, angles: torch.Tensor, config: FluxConfig
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, `[B, A, S, F]` each."""
        *projections, norm_q, norm_k = names
        cut = (self.linear(state, name, tokens).unflatten(-1, (-1, config.attention_head_dim)) for name in projections)
        query, key, value = (each.transpose(1, 2) for each in cut)
        query, key = self.rms_norm(query, state[f"{norm_q}.weight"]), self.rms_norm(key, state[f"{norm_k}.weight"])
        return self.turn(query, angles), self.turn(key, angles), value

    def rms_norm(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Each head by itself."""
        return heads * (heads.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt().float() * weight

    def turn(self, heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Neighbours are a pair."""
        cos, sin = angles.cos().float(), angles.sin().float()
        x, y = heads.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([x * cos - y * sin, y * cos + x * sin], -1).flatten(-2)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """All tokens of an example to each other, `[B, J, D]`."""
        scores = (query.double() @ key.double().mT / self.root(query, query.shape[1])).softmax(-1)
        return (scores @ value.double()).float().transpose(1, 2).flatten(2)

    def last(self, state: State, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """The final layer, whose scale comes before the shift."""
        scale, shift = self.halves(*self.parts(state, "norm_out", conditioning, 2))
        return self.linear(state, "proj_out", self.modulated(tokens, shift, scale))
