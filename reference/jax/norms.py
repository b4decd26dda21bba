"""Norms with parameters: RMSNorm, LayerNorm, GroupNorm and what follows it.

Shapes: B batch_size, C channels, G num_groups, H height, W width, D hidden_size.
"""

import math

import jax

from gaugeblock.reference.jax.layers import layer_norm


def rms_norm(hidden_states: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.norms.rms_norm`."""
    mean_square = (hidden_states * hidden_states).mean(axis=-1, keepdims=True)
    return hidden_states * jax.lax.rsqrt(mean_square + eps) * weight


def layer_norm_affine(hidden_states: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.norms.layer_norm_affine`."""
    return layer_norm(hidden_states, eps=eps) * weight + bias


def group_norm(images: jax.Array, weight: jax.Array, bias: jax.Array, *, num_groups: int, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.norms.group_norm`."""
    groups_BGN = images.reshape(images.shape[0], num_groups, math.prod(images.shape[1:]) // num_groups)
    normalized_BCHW = layer_norm(groups_BGN, eps=eps).reshape(images.shape)
    return normalized_BCHW * weight[:, None, None] + bias[:, None, None]


def group_norm_silu(images: jax.Array, weight: jax.Array, bias: jax.Array, *, num_groups: int, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.norms.group_norm_silu`."""
    return jax.nn.silu(group_norm(images, weight, bias, num_groups=num_groups, eps=eps))
