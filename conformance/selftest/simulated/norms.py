"""Norms with parameters, simulated: a row, or a group of channels, is blocks of numbers, read once for each of its sums."""

import torch

from gaugeblock.conformance.selftest.simulated.layers import BlockNorm
from gaugeblock.reference import validation


class RmsNorm(BlockNorm):
    """`norms.rms_norm`."""

    contract = "norms.rms_norm"

    def __call__(self, hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
        validation.rms_norm(hidden_states, weight, eps)
        normalized = self.normalize(self.read(hidden_states), eps)
        return self.store(self.scale(normalized, weight.float()), hidden_states)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows in float32."""
        return tokens.float()

    def center(self, tokens: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """Rows stay where they are."""
        return tokens

    def scale(self, normalized: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Column by column; weight is float32."""
        return normalized * weight


class AffineNorm(BlockNorm):
    """`norms.layer_norm_affine`."""

    contract = "norms.layer_norm_affine"

    def __call__(self, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
        validation.layer_norm_affine(hidden_states, weight, bias, eps)
        normalized = self.normalize(hidden_states.float(), eps)
        return self.store(self.affine(normalized, weight.float(), bias.float()), hidden_states)

    def affine(self, normalized: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Scaled and shifted; weight and bias are float32."""
        return normalized * weight + bias


class GroupNorm(BlockNorm):
    """`norms.group_norm`."""

    contract = "norms.group_norm"
    columns = 512

    def __call__(
        self, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float
    ) -> torch.Tensor:
        validation.group_norm(images, weight, bias, num_groups, eps)
        groups = self.group(images.float(), num_groups)
        normalized = self.ungroup(self.normalize(groups, eps), images)
        return self.store(self.activate(self.affine(normalized, weight.float(), bias.float())), images)

    def group(self, images: torch.Tensor, num_groups: int) -> torch.Tensor:
        """The numbers of each group, `[B, G, N]`."""
        return images.reshape(images.shape[0], num_groups, images.shape[1:].numel() // num_groups)

    def ungroup(self, groups: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The images that groups are of."""
        return groups.reshape(images.shape)

    def affine(self, normalized: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Scaled and shifted channel by channel; weight and bias are float32."""
        return normalized * weight[:, None, None] + bias[:, None, None]

    def activate(self, out: torch.Tensor) -> torch.Tensor:
        """What follows, in float32."""
        return out


class GroupNormSilu(GroupNorm):
    """`norms.group_norm_silu`."""

    contract = "norms.group_norm_silu"

    def activate(self, out: torch.Tensor) -> torch.Tensor:
        """The result is rounded only then."""
        return torch.nn.functional.silu(out)
