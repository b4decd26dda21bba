"""MMDiT, simulated: the model as one forward pass, of which each step can be overridden; much of it is DiT's."""

import torch
from torch.nn.functional import silu

from gaugeblock.conformance.selftest.simulated.dit import Dit, State
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch.mmdit import NORM_EPS, POSITIONS, block_state, state_shapes

IMAGE = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


class Mmdit(Dit):
    """`mmdit.mmdit`."""

    contract = "mmdit.mmdit"

    def __call__(
        self,
        state: State,
        latents: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timesteps: torch.Tensor,
        *,
        config: MMDiTConfig,
    ) -> torch.Tensor:
        inputs = latents, encoder_hidden_states, pooled_projections, timesteps
        validation.mmdit(state, *inputs, config, state_shapes(config))
        return self.run({name: self.load(each) for name, each in state.items()}, *inputs, config).to(latents.dtype)

    def run(
        self,
        state: State,
        latents: torch.Tensor,
        text: torch.Tensor,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        config: MMDiTConfig,
    ) -> torch.Tensor:
        """All that follows the checks."""
        tokens = self.embed(state, self.load(latents), config)
        text = self.linear(state, "context_embedder", self.load_text(text))
        conditioning = silu(self.conditions(state, timesteps, self.load(pooled)))
        for index in range(config.num_layers):
            tokens, text = self.block(block_state(state, index), tokens, text, conditioning, config, index)
        return self.image(self.last(state, tokens, conditioning), latents.shape[2] // config.patch_size, config)

    def load_text(self, text: torch.Tensor) -> torch.Tensor:
        """The tokens of the text as they are computed with."""
        return self.load(text)

    def embed(self, state: State, latents: torch.Tensor, config: MMDiTConfig) -> torch.Tensor:
        """Tokens that know their place, `[B, S, D]`."""
        patches = self.linear(state, "pos_embed.proj", self.patchify(latents, config.patch_size))
        rows, columns = (size // config.patch_size for size in latents.shape[2:])
        return patches + self.crop(state[POSITIONS][0].unflatten(0, (config.pos_embed_max_size, -1)), rows, columns).flatten(0, 1)

    def crop(self, table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """The middle of the table of positions `[Y, X, D]`."""
        top, left = self.margin(len(table), rows), self.margin(len(table), columns)
        return table[top : top + rows, left : left + columns]

    def margin(self, size: int, number: int) -> int:
        """What lies before the middle."""
        return (size - number) // 2

    def conditions(self, state: State, timesteps: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """What steers the blocks, `[B, D]`."""
        time, text = (f"time_text_embed.{name}_embedder.linear" for name in ("timestep", "text"))
        time_embedding = self.linear(state, f"{time}_2", silu(self.linear(state, f"{time}_1", self.times(timesteps))))
        return time_embedding + self.linear(state, f"{text}_2", silu(self.linear(state, f"{text}_1", pooled)))

    def times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The embedding of times, `[B, F]` float32."""
        return self.waves(timesteps.double(), 256, 0).float()

    def block(
        self,
        state: State,
        tokens: torch.Tensor,
        text: torch.Tensor,
        conditioning: torch.Tensor,
        config: MMDiTConfig,
        index: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Joint attention, then a feed-forward network for each."""
        is_last = index == config.num_layers - 1
        parts = self.steering(state, "norm1", conditioning, config)
        text_parts = self.steering(state, "norm1_context", conditioning, config)
        if is_last:
            text_parts = self.halves(*text_parts)
        modulated = self.modulate(self.norm(tokens, NORM_EPS), *parts[:2])
        text_modulated = self.modulate(self.norm(text, NORM_EPS), *text_parts[:2])
        attended, text_attended = self.joint_attention(states.part(state, "attn"), modulated, text_modulated, config)
        attended = parts[2] * self.linear(state, "attn.to_out.0", attended)
        if index in config.dual_attention_layers:
            shift, scale, gate = parts[6:]
            modulated = self.modulate(self.norm(self.seen_again(tokens, attended), NORM_EPS), shift, scale)
            tokens = tokens + gate * self.second_attention(states.part(state, "attn2"), modulated, config)
        tokens = self.feed_forward(state, "ff", tokens + attended, *parts[3:6])
        if not is_last:
            text = text + text_parts[2] * self.linear(state, "attn.to_add_out", text_attended)
            text = self.feed_forward(state, "ff_context", text, *text_parts[3:6])
        return tokens, text

    def steering(self, state: State, name: str, conditioning: torch.Tensor, config: MMDiTConfig) -> tuple[torch.Tensor, ...]:
        """Shifts, scales and gates, `[B, 1, D]` each."""
        parts = self.linear(state, f"{name}.linear", conditioning)[:, None]
        return self.ninths(*parts.chunk(parts.shape[-1] // config.hidden_size, -1))

    def ninths(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """shift_1, scale_1, gate_1, shift_2, scale_2, gate_2, shift_3, scale_3, gate_3, or less of them."""
        return parts

    def halves(self, scale: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale of the last block's text, and of the end."""
        return shift, scale

    def seen_again(self, tokens: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What the second attention sees: the tokens that came in."""
        return tokens

    def joint_attention(
        self, state: State, tokens: torch.Tensor, text: torch.Tensor, config: MMDiTConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What all tokens find in each other, before it is projected."""
        of_image, of_text = self.own_heads(state, IMAGE, tokens, config), self.own_heads(state, TEXT, text, config)
        attended = self.attend(*(torch.cat(self.in_order(*both), 2) for both in zip(of_image, of_text, strict=True)))
        return attended[:, : tokens.shape[1]], attended[:, tokens.shape[1] :]

    def in_order(self, of_image: torch.Tensor, of_text: torch.Tensor) -> list[torch.Tensor]:
        """The image comes first."""
        return [of_image, of_text]

    def second_attention(self, state: State, tokens: torch.Tensor, config: MMDiTConfig) -> torch.Tensor:
        """What the image's tokens find in each other, projected."""
        return self.linear(state, "to_out.0", self.attend(*self.own_heads(state, IMAGE, tokens, config)))

    def own_heads(
        self, state: State, names: tuple[str, ...], tokens: torch.Tensor, config: MMDiTConfig
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of image or text, `[B, A, S, F]` each."""
        query, key, value = (self.split(self.linear(state, name, tokens), config.num_attention_heads) for name in names[:3])
        if config.qk_norm is None:
            return query, key, value
        query, key = (self.rms(each, state[f"{norm}.weight"]) for each, norm in zip((query, key), names[3:], strict=True))
        return query, key, value

    def split(self, tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
        """`[B, A, S, F]`."""
        return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    def rms(self, heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of each head."""
        return heads * (heads.double().square().mean(-1, keepdim=True) + NORM_EPS).rsqrt().float() * weight

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention, `[B, S, D]`."""
        scores = (query.double() @ key.double().mT / self.root(query, query.shape[1])).softmax(-1)
        return (scores @ value.double()).float().transpose(1, 2).flatten(2)

    def feed_forward(self, state: State, name: str, tokens: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        """A gated network of the modulated tokens, added to them."""
        shift, scale, gate = parts
        inner = self.linear(state, f"{name}.net.0.proj", self.modulate(self.norm(tokens, NORM_EPS), shift, scale))
        return tokens + gate * self.linear(state, f"{name}.net.2", self.gelu(inner))

    def last(self, state: State, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """The final layer's patches, `[B, S, P · P · C]`."""
        shift, scale = self.halves(*self.linear(state, "norm_out.linear", conditioning)[:, None].chunk(2, -1))
        return self.linear(state, "proj_out", self.modulate(self.norm(tokens, NORM_EPS), shift, scale))

    def image(self, patches: torch.Tensor, rows: int, config: MMDiTConfig) -> torch.Tensor:
        """`[B, C, H, W]`, of so many rows of patches."""
        patch = config.patch_size
        tiles = patches.unflatten(1, (rows, -1)).unflatten(3, (patch, patch, config.out_channels))
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
