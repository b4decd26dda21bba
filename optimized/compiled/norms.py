"""The norms of `reference.torch.norms`, compiled by torch.compile: each in one or two kernels.

Bound by memory, like the Triton versions. One compilation serves all sizes but 0 and 1, which torch.compile treats by
themselves, as it does each dtype, rank, order of strides, number of groups and set of wanted gradients.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch import norms as reference

# The references check their arguments while they are traced; an error that is raised there would lose its type.
_rms_norm = torch.compile(reference.rms_norm, dynamic=True)
_layer_norm_affine = torch.compile(reference.layer_norm_affine, dynamic=True)
_group_norm = torch.compile(reference.group_norm, dynamic=True)
_group_norm_silu = torch.compile(reference.group_norm_silu, dynamic=True)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Divide the last axis by its root mean square, then scale it; all as of `reference.torch.norms.rms_norm`."""
    validation.rms_norm(hidden_states, weight, eps)
    return _rms_norm(hidden_states, weight, eps=eps)


def layer_norm_affine(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize the last axis, then scale and shift it; all as of `reference.torch.norms.layer_norm_affine`."""
    validation.layer_norm_affine(hidden_states, weight, bias, eps)
    return _layer_norm_affine(hidden_states, weight, bias, eps=eps)


def group_norm(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float) -> torch.Tensor:
    """Normalize groups of channels, then scale and shift each channel; all as of `reference.torch.norms.group_norm`."""
    validation.group_norm(images, weight, bias, num_groups, eps)
    return _group_norm(images, weight, bias, num_groups=num_groups, eps=eps)


def group_norm_silu(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float
) -> torch.Tensor:
    """As `group_norm`, and silu of its result; all as of `reference.torch.norms.group_norm_silu`."""
    validation.group_norm(images, weight, bias, num_groups, eps)
    return _group_norm_silu(images, weight, bias, num_groups=num_groups, eps=eps)
