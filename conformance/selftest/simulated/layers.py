"""Adaptive LayerNorms, simulated: a token is a row of blocks of columns, read once for each of mean, variance and result."""

import torch

from gaugeblock.reference import validation


class BlockNorm:
    """Rows of mean 0 and variance 1, in float32."""

    columns = 64  # of a block

    def normalize(self, tokens: torch.Tensor, eps: float) -> torch.Tensor:
        """Tokens of mean 0 and variance 1."""
        centred = self.center(tokens, self.mean(tokens))
        return centred * self.rstd(self.variance(centred), eps)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Of each token, `[..., 1]`."""
        return self.sum(values) / values.shape[-1]

    def center(self, tokens: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """What the second pass reads."""
        return tokens - mean

    def variance(self, centred: torch.Tensor) -> torch.Tensor:
        """Of each token, `[..., 1]`."""
        return self.mean(centred * centred)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Of each token, block by block in float32, `[..., 1]`."""
        blocks = [block.double().sum(-1, keepdim=True).float() for block in values.split(self.columns, -1)]
        return sum(blocks[1:], blocks[0])

    def rstd(self, variance: torch.Tensor, eps: float) -> torch.Tensor:
        """One over the deviation."""
        return (variance.double() + eps).rsqrt().float()

    def store(self, result: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What is returned, in the dtype of the tokens."""
        return result.to(tokens.dtype)


class NormModulate(BlockNorm):
    """`layers.layer_norm_modulate`."""

    contract = "layers.layer_norm_modulate"

    def __call__(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, eps: float) -> torch.Tensor:
        self.validate(hidden_states, shift, scale, eps)
        normalized = self.normalize(hidden_states.float(), eps)
        return self.store(self.modulate(normalized, shift.float(), scale.float()), hidden_states)

    def validate(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> None:
        """Raises what the contract demands."""
        validation.layer_norm_modulate(hidden_states, shift, scale, eps)

    def modulate(self, normalized: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Scaled and shifted as its example asks; shift and scale are `[B, D]` float32."""
        return normalized * (1 + scale[:, None]) + shift[:, None]


class GatedNormModulate(NormModulate):
    """`layers.gated_residual_layer_norm_modulate`: the sum stays in registers, and is normalized before it is rounded."""

    contract = "layers.gated_residual_layer_norm_modulate"

    def __call__(
        self,
        residual: torch.Tensor,
        branch: torch.Tensor,
        gate: torch.Tensor,
        shift: torch.Tensor,
        scale: torch.Tensor,
        *,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        validation.gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps)
        hidden_states = self.add(residual.float(), branch.float(), gate.float())
        modulated = self.modulate(self.normalize(self.kept(hidden_states, residual), eps), shift.float(), scale.float())
        return self.store(hidden_states, residual), self.store(modulated, residual)

    def add(self, residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """The residual stream, `[B, S, D]`; gate is `[B, D]`."""
        return residual + gate[:, None] * branch

    def kept(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What the norm reads of the sum."""
        return hidden_states
