"""The text-latent MMDiT, simulated: one forward pass, of which each step can be overridden."""

import math
from collections.abc import Mapping

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.simulated.hyper_connections import Connections
from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import TextLatentMMDiTConfig
from gaugeblock.reference.torch.text_latent_mmdit import state_shapes

State = Mapping[str, torch.Tensor]
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class TextLatentMmdit(Connections):
    """`text_latent_mmdit.text_latent_mmdit`."""

    contract = "text_latent_mmdit.text_latent_mmdit"

    def __call__(
        self,
        state: State,
        text_tokens: torch.Tensor,
        latents: torch.Tensor,
        text_timesteps: torch.Tensor,
        latent_timesteps: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        config: TextLatentMMDiTConfig,
    ) -> Results:
        inputs = text_tokens, latents, text_timesteps, latent_timesteps, attention_mask
        validation.text_latent_mmdit(state, *inputs, config, state_shapes(config))
        validation.text_latent_tokens_in_range(text_tokens, config)
        parameters = self.parameters(state)
        tokens = [self.embed_text(parameters, text_tokens.long()), self.embed_latents(parameters, self.wide(latents))]
        active = functional.silu(self.conditions(parameters, text_timesteps, latent_timesteps))
        may_look = self.may_look(attention_mask)
        streams = [self.spread(each, config.num_residual_streams) for each in tokens]
        for index in range(config.n_blocks):
            streams = self.block(parameters, f"mmdit.blocks.{index}", streams, active, may_look)
        text, latent = (self.last_norm(parameters, place, self.joined(each)) for place, each in enumerate(streams))
        logits = self.linear(parameters, "text_head", text)
        clusters = self.linear(parameters, "text_head_clusters", text) if config.cluster_size else logits[..., :0]
        inner = self.gelu(self.linear(parameters, "latent_head.0", latent))
        results = logits, self.linear(parameters, "latent_head.3", inner), clusters
        return tuple(each.to(latents.dtype) for each in results)  # type: ignore[return-value]

    def parameters(self, state: State) -> dict[str, torch.Tensor]:
        """float32."""
        return {name: tensor.float() for name, tensor in state.items()}

    def wide(self, latents: torch.Tensor) -> torch.Tensor:
        """In the dtype of the parameters."""
        return latents.float()

    def embed_text(self, state: State, ids: torch.Tensor) -> torch.Tensor:
        """Tokens and their places, `[B, T, D]`."""
        return state["text_encoder.token_embed.weight"][ids] + state["text_encoder.position_embed"][0][self.places(ids)]

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, T]`."""
        return torch.arange(ids.shape[1]).expand(ids.shape)

    def embed_latents(self, state: State, latents: torch.Tensor) -> torch.Tensor:
        """`[B, 1, D]`."""
        name = "latent_encoder.projection"
        inner = self.layer_norm(self.linear(state, f"{name}.0", latents[:, None]))
        inner = inner * state[f"{name}.1.weight"] + state[f"{name}.1.bias"]
        return self.linear(state, f"{name}.3", self.gelu(inner)) + state["latent_encoder.position_embed"]

    def conditions(self, state: State, text_times: torch.Tensor, latent_times: torch.Tensor) -> torch.Tensor:
        """What steers the blocks, `[B, C]`."""
        both = [self.time(state, "text_sigma_map", text_times), self.time(state, "latent_sigma_map", latent_times)]
        inner = self.linear(state, "conditioning.combine.0", self.joint_times(both))
        return self.linear(state, "conditioning.combine.2", functional.silu(inner))

    def time(self, state: State, name: str, times: torch.Tensor) -> torch.Tensor:
        """One time, `[B, C]`."""
        waves = self.waves(times).to(state["text_head.weight"].dtype)
        inner = functional.silu(self.linear(state, f"conditioning.{name}.mlp.0", waves))
        return self.linear(state, f"conditioning.{name}.mlp.2", inner)

    def waves(self, times: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines."""
        angles = times.double()[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float64))
        return torch.cat([angles.cos(), angles.sin()], 1)

    def joint_times(self, both: list[torch.Tensor]) -> torch.Tensor:
        """Text, then latent."""
        return functional.silu(torch.cat(both, 1))

    def spread(self, tokens: torch.Tensor, num_streams: int) -> torch.Tensor:
        """Equal streams, `[B, S, K, D]`."""
        return tokens[:, :, None].expand(-1, -1, num_streams, -1)

    def joined(self, streams: torch.Tensor) -> torch.Tensor:
        """Their sum."""
        return streams.sum(2)

    def may_look(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """What all tokens see, `[B, 1, 1, J]`."""
        return functional.pad(attention_mask, (0, 1), value=True)[:, None, None]

    def block(
        self, state: State, name: str, streams: list[torch.Tensor], active: torch.Tensor, may_look: torch.Tensor
    ) -> list[torch.Tensor]:
        """Attention, then a feed-forward network."""
        gates = self.linear(state, f"{name}.to_post_branch_gammas.2", active)[:, None].chunk(4, -1)
        text, latent, *of_feed_forward = self.order_of_gates(gates)
        streams, written = self.read(state, f"{name}.attn", streams, active)
        attended = self.attention(state, f"{name}.joint_attn", streams, may_look)
        streams = [self.write(*each) for each in zip(written, attended, (text, latent), strict=True)]
        streams, written = self.read(state, f"{name}.ff", streams, active)
        fed = [self.feed_forward(state, f"{name}.feedforwards.{place}.ff", each) for place, each in enumerate(streams)]
        return [self.write(*each) for each in zip(written, fed, of_feed_forward, strict=True)]

    def order_of_gates(self, gates: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Attention of text and latent, feed-forward of text and latent."""
        return gates

    def read(
        self, state: State, name: str, streams: list[torch.Tensor], active: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """What a branch gets, normalized and modulated, and what its result is written to."""
        normalized, written = [], []
        for place, each in enumerate(streams):
            read, mixed, strength = self.connection(states.part(state, f"{name}_residual_fns.{place}"), each)
            scale, shift = self.linear(state, f"{name}_layernorms.{place}.to_cond.2", active)[:, None].chunk(2, -1)
            normalized.append(self.modulate(self.layer_norm(read), scale, shift))
            written.append((mixed, strength))
        return normalized, written

    def modulate(self, normalized: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """The scale is what there is."""
        return normalized * scale + shift

    def write(self, written: tuple[torch.Tensor, torch.Tensor], branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """To every stream."""
        mixed, strength = written
        return mixed + strength[..., None] * (gate * branch)[:, :, None]

    def attention(self, state: State, name: str, tokens: list[torch.Tensor], may_look: torch.Tensor) -> list[torch.Tensor]:
        """The attention branches."""
        heads = [self.heads(state, f"{name}.to_qkv.{place}", each) for place, each in enumerate(tokens)]
        query, key, value = (torch.cat(both, 2) for both in zip(*self.in_order(heads), strict=True))
        attended = self.attended(query, key, value, may_look).transpose(1, 2).flatten(2)
        num_tokens = tokens[0].shape[1]
        parts = attended[:, :num_tokens], attended[:, num_tokens:]
        return [self.linear(state, f"{name}.to_out.{place}", part) for place, part in enumerate(parts)]

    def in_order(self, heads: list[tuple[torch.Tensor, ...]]) -> list[tuple[torch.Tensor, ...]]:
        """The text comes first."""
        return heads

    def heads(self, state: State, name: str, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, `[B, 8, S, 64]` each."""
        thirds = self.linear(state, name, tokens).chunk(3, -1)
        return tuple(each.unflatten(-1, (8, 64)).transpose(1, 2) for each in thirds)

    def attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, may_look: torch.Tensor) -> torch.Tensor:
        """Of the whole sequence."""
        scores = query.double() @ key.double().mT / self.root()
        weights = scores.masked_fill(~may_look, -torch.inf).softmax(-1)
        return (weights @ value.double()).to(value.dtype)

    def root(self) -> float:
        """Of a head's size."""
        return 8.0

    def feed_forward(self, state: State, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """The other branch."""
        return self.linear(state, f"{name}.2", self.gelu(self.linear(state, f"{name}.0.0", tokens)))

    def gelu(self, inner: torch.Tensor) -> torch.Tensor:
        """The exact one."""
        return functional.gelu(inner)

    def layer_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """Without parameters."""
        centred = tokens - tokens.double().mean(-1, keepdim=True).to(tokens.dtype)
        variance = centred.double().square().mean(-1, keepdim=True)
        return centred * (variance + self.eps()).rsqrt().to(tokens.dtype)

    def eps(self) -> float:
        """Of every LayerNorm."""
        return 1e-5

    def last_norm(self, state: State, place: int, tokens: torch.Tensor) -> torch.Tensor:
        """Of text or latent."""
        return self.unit(tokens) * state[f"mmdit.norms.{place}.g"]

    def linear(self, state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """A matrix product, and a bias if there is one."""
        product = self.product(inputs, state[f"{name}.weight"].mT)
        return product + state[f"{name}.bias"] if f"{name}.bias" in state else product
