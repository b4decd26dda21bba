"""DiT, simulated: the model as one forward pass, of which each step can be overridden."""

import math
from collections.abc import Mapping

import torch
from torch.nn.functional import silu

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.torch.dit import NORM_EPS, block_state, state_shapes

State = Mapping[str, torch.Tensor]


class Dit:
    """`dit.dit`."""

    contract = "dit.dit"

    def __call__(
        self,
        state: State,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        class_labels: torch.Tensor,
        *,
        config: DiTConfig,
    ) -> torch.Tensor:
        validation.dit(state, latents, timesteps, class_labels, config, self.shapes(config))
        validation.class_labels_in_range(class_labels, config.num_classes)
        parameters = {name: tensor.float() for name, tensor in state.items()}
        tokens = self.embed(parameters, self.load(latents), config)
        conditioning = self.conditions(parameters, timesteps.float(), class_labels, config)
        for index in range(config.depth):
            tokens = self.kept(self.block(block_state(parameters, index), tokens, conditioning, config))
        return self.unpatchify(self.last(parameters, tokens, conditioning), config).to(latents.dtype)

    def shapes(self, config: DiTConfig) -> dict[str, tuple[int, ...]]:
        """Of the parameters."""
        return state_shapes(config)

    def load(self, latents: torch.Tensor) -> torch.Tensor:
        """float32."""
        return latents.float()

    def linear(self, state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """A matrix product and a bias."""
        weight = state[f"{name}.weight"].flatten(1)
        return (inputs.double() @ weight.double().mT).float() + state[f"{name}.bias"]

    def embed(self, state: State, latents: torch.Tensor, config: DiTConfig) -> torch.Tensor:
        """Tokens that know their place, `[B, S, D]`."""
        patches = self.patchify(latents, config.patch_size)
        return self.linear(state, "x_embedder.proj", patches) + self.places(config).float()

    def patchify(self, latents: torch.Tensor, patch: int) -> torch.Tensor:
        """`[B, S, C · P · P]`."""
        return torch.nn.functional.unfold(latents.double(), patch, stride=patch).mT.float()

    def places(self, config: DiTConfig) -> torch.Tensor:
        """The position table `[S, D]`, float64: the column first, then the row."""
        grid = torch.arange(config.input_size // config.patch_size, dtype=torch.float64)
        waves = self.waves(grid, config.hidden_size // 2, 0)
        column, row = waves.repeat(len(grid), 1), waves.repeat_interleave(len(grid), 0)
        return self.join_axes(column.roll(waves.shape[1] // 2, 1), row.roll(waves.shape[1] // 2, 1))

    def join_axes(self, column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """The two halves of a place."""
        return torch.cat([column, row], 1)

    def waves(self, values: torch.Tensor, width: int, shift: int) -> torch.Tensor:
        """Cosines, then sines, `[..., width]`."""
        half = width // 2
        frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64) / (half - shift))
        angles = values.double()[..., None] * frequencies.to(values.dtype).double()
        return torch.cat([angles.cos(), angles.sin()], -1)

    def times(self, timesteps: torch.Tensor, config: DiTConfig) -> torch.Tensor:
        """The embedding of times, `[B, F]` float32."""
        return self.waves(timesteps.double(), config.frequency_embedding_size, config.frequency_shift).float()

    def conditions(self, state: State, timesteps: torch.Tensor, labels: torch.Tensor, config: DiTConfig) -> torch.Tensor:
        """What steers the blocks, through its silu, `[B, D]`."""
        inner = silu(self.linear(state, "t_embedder.mlp.0", self.times(timesteps, config)))
        return silu(self.linear(state, "t_embedder.mlp.2", inner) + self.classes(state, labels, config))

    def classes(self, state: State, labels: torch.Tensor, config: DiTConfig) -> torch.Tensor:
        """The embedding of labels, `[B, D]`."""
        return state["y_embedder.embedding_table.weight"][labels]

    def block(self, state: State, tokens: torch.Tensor, conditioning: torch.Tensor, config: DiTConfig) -> torch.Tensor:
        """Attention, then a feed-forward network."""
        parts = self.linear(state, "adaLN_modulation.1", conditioning)[:, None].chunk(6, -1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.sixths(*parts)
        attended = self.attention(state, self.modulate(self.norm(tokens, NORM_EPS), shift_1, scale_1), config.num_heads)
        tokens = tokens + gate_1 * attended
        modulated = self.modulate(self.norm(tokens, config.norm_eps), shift_2, scale_2)
        return tokens + gate_2 * self.feed_forward(state, modulated, config)

    def feed_forward(self, state: State, modulated: torch.Tensor, config: DiTConfig) -> torch.Tensor:
        """The second branch."""
        return self.linear(state, "mlp.fc2", self.gelu(self.linear(state, "mlp.fc1", modulated)))

    def sixths(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """shift_1, scale_1, gate_1, shift_2, scale_2, gate_2."""
        return parts

    def norm(self, tokens: torch.Tensor, eps: float) -> torch.Tensor:
        """LayerNorm without parameters, `[B, S, D]`."""
        centred = tokens - tokens.double().mean(-1, keepdim=True).float()
        return centred * (centred.double().square().mean(-1, keepdim=True) + eps).rsqrt().float()

    def modulate(self, normalized: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Scaled and shifted."""
        return normalized * (1 + scale) + shift

    def attention(self, state: State, tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
        """All tokens of an example attend to each other."""
        query, key, value = self.heads(self.linear(state, "attn.qkv", tokens), num_heads)
        scores = (query.double() @ key.double().mT / self.root(query, num_heads)).softmax(-1)
        return self.linear(state, "attn.proj", (scores @ value.double()).float().transpose(1, 2).flatten(2))

    def heads(self, qkv: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, `[B, A, S, F]` each."""
        return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def root(self, query: torch.Tensor, num_heads: int) -> float:
        """What scores are divided by."""
        return math.sqrt(query.shape[-1])

    def gelu(self, inner: torch.Tensor) -> torch.Tensor:
        """The tanh approximation."""
        return torch.nn.functional.gelu(inner, approximate="tanh")

    def kept(self, tokens: torch.Tensor) -> torch.Tensor:
        """What a block leaves for the next."""
        return tokens

    def last(self, state: State, tokens: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """The final layer's patches, `[B, S, P · P · C]`."""
        shift, scale = self.halves(*self.linear(state, "final_layer.adaLN_modulation.1", conditioning)[:, None].chunk(2, -1))
        return self.linear(state, "final_layer.linear", self.modulate(self.norm(tokens, NORM_EPS), shift, scale))

    def halves(self, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Shift and scale of the final layer."""
        return parts

    def unpatchify(self, patches: torch.Tensor, config: DiTConfig) -> torch.Tensor:
        """The image `[B, C, H, W]`."""
        grid, patch = config.input_size // config.patch_size, config.patch_size
        tiles = patches.unflatten(1, (grid, grid)).unflatten(3, (patch, patch, config.out_channels))
        return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
