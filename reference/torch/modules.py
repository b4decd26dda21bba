"""Layers whose parameters a state dict holds by name: `linear(state, "to_q", x)` multiplies by `state["to_q.weight"]`."""

from collections.abc import Mapping

import torch

from gaugeblock.reference.torch import convolutions, layers, norms

State = Mapping[str, torch.Tensor]


def linear(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Apply the linear layer of that name, with or without a bias, to the last axis."""
    return layers.linear(inputs, state[f"{name}.weight"], state.get(f"{name}.bias"))


def convolution(state: State, name: str, images: torch.Tensor, *, stride: int = 1, padding: int | None = None) -> torch.Tensor:
    """Apply the convolution of that name to [B, C, H, W]; see `convolutions.convolution`."""
    return convolutions.convolution(images, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=padding)


def group_norm(state: State, name: str, images: torch.Tensor, *, num_groups: int, eps: float) -> torch.Tensor:
    """Apply the GroupNorm of that name to [B, C, H, W]."""
    return norms.group_norm(images, state[f"{name}.weight"], state[f"{name}.bias"], num_groups=num_groups, eps=eps)


def group_norm_silu(state: State, name: str, images: torch.Tensor, *, num_groups: int, eps: float) -> torch.Tensor:
    """Apply the GroupNorm of that name to [B, C, H, W], and silu to its result."""
    return norms.group_norm_silu(images, state[f"{name}.weight"], state[f"{name}.bias"], num_groups=num_groups, eps=eps)


def layer_norm(state: State, name: str, hidden_states: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Apply the LayerNorm of that name to the last axis."""
    return norms.layer_norm_affine(hidden_states, state[f"{name}.weight"], state[f"{name}.bias"], eps=eps)


def rms_norm(state: State, name: str, hidden_states: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Apply the RMSNorm of that name to the last axis."""
    return norms.rms_norm(hidden_states, state[f"{name}.weight"], eps=eps)


def two_linears(state: State, names: tuple[str, str], inputs: torch.Tensor) -> torch.Tensor:
    """Apply two linear layers with a silu between them, as embeddings of times and conditions are."""
    return linear(state, names[1], torch.nn.functional.silu(linear(state, names[0], inputs)))
