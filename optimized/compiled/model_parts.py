"""What models are composed of here: torch's own functions, in blocks that torch.compile fuses, or, on a CPU, as they are.

There compiling takes minutes, and each function reads and writes memory once.
"""

from dataclasses import replace

import torch
from torch.nn import functional

from gaugeblock.optimized.compiled.library_layers import compiled
from gaugeblock.optimized.model_parts import Parts, as_it_is
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.torch.precision import at_least_float32


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
    # on a CPU torch sums the gradients of weight and bias in the dtype of the tokens (2.13): in bfloat16 two digits are left
    wide, weight, bias = map(at_least_float32, (hidden_states, weight, bias))
    return functional.layer_norm(wide, weight.shape, weight, bias, eps).to(hidden_states.dtype)


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximation: GeluApproximation) -> torch.Tensor:
    """As `gaugeblock.reference.torch.gated_activations.geglu`."""
    return functional.gelu(gate, approximate=approximation) * up


def accept(name: str, tensor: torch.Tensor) -> None:
    """Reject nothing: torch takes every floating dtype."""


PARTS = Parts(
    group_norm=group_norm,
    group_norm_silu=group_norm_silu,
    layer_norm_affine=layer_norm_affine,
    geglu=geglu,
    memory_format=torch.channels_last,
    block=compiled,
    reject=accept,
)
# with the channels last torch's GroupNorm on a CPU takes E[x**2] - E[x]**2 for the variance (2.13), which is less exact
LIBRARY = replace(PARTS, memory_format=torch.contiguous_format, block=as_it_is)
