"""What models are composed of here: torch's own functions, in blocks that torch.compile fuses."""

from collections.abc import Callable
from functools import cache

import torch
from torch.nn import functional

from gaugeblock.optimized.model_parts import Parts
from gaugeblock.reference.configs import GeluApproximation


def group_norm(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float) -> torch.Tensor:
    """As `gaugeblock.reference.torch.norms.group_norm`; nothing is checked, as in all of these."""
    return functional.group_norm(images, num_groups, weight, bias, eps)


def group_norm_silu(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.norms.group_norm_silu`."""
    return functional.silu(functional.group_norm(images, num_groups, weight, bias, eps))


def layer_norm_affine(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """As `gaugeblock.reference.torch.norms.layer_norm_affine`."""
    return functional.layer_norm(hidden_states, weight.shape, weight, bias, eps)


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximation: GeluApproximation) -> torch.Tensor:
    """As `gaugeblock.reference.torch.gated_activations.geglu`."""
    return functional.gelu(gate, approximate=approximation) * up


@cache
def compiled(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compiled once for all sizes, when it is first needed: importing torch.compile's compiler takes a second."""
    return torch.compile(block, dynamic=True)


def accept(name: str, tensor: torch.Tensor) -> None:
    """Reject nothing: torch takes every floating dtype."""


PARTS = Parts(
    group_norm=group_norm,
    group_norm_silu=group_norm_silu,
    layer_norm_affine=layer_norm_affine,
    geglu=geglu,
    block=compiled,
    reject=accept,
)
