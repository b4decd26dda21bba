"""Norms with parameters: RMSNorm, LayerNorm, GroupNorm and what follows it.

Shapes: B batch_size, C channels, G num_groups, H height, W width, D hidden_size.
"""

import math

import torch

from gaugeblock.reference.torch.layers import layer_norm


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Divide the last axis by its root mean square, then scale it.

    out = x / sqrt(mean(x**2) + eps) * weight
    """
    mean_square = (hidden_states * hidden_states).mean(dim=-1, keepdim=True)
    return hidden_states * torch.rsqrt(mean_square + eps) * weight


def layer_norm_affine(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize the last axis to mean 0 and variance 1, then scale and shift it.

    out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias
    """
    return layer_norm(hidden_states, eps=eps) * weight + bias


def group_norm(images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float) -> torch.Tensor:
    """Normalize groups of channels of an image [B, C, H, W] to mean 0 and variance 1, then scale and shift each channel.

    out[b, c] = (x[b, c] - mean) / sqrt(variance + eps) * weight[c] + bias[c],  mean and variance of c's group of x[b]
    """
    groups_BGN = images.reshape(images.shape[0], num_groups, math.prod(images.shape[1:]) // num_groups)
    normalized_BCHW = layer_norm(groups_BGN, eps=eps).reshape(images.shape)
    return normalized_BCHW * weight[:, None, None] + bias[:, None, None]


def group_norm_silu(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, num_groups: int, eps: float
) -> torch.Tensor:
    """As `group_norm`, and silu(x) = x * sigmoid(x) of the result."""
    return torch.nn.functional.silu(group_norm(images, weight, bias, num_groups=num_groups, eps=eps))
