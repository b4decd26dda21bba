"""Norms with parameters: RMSNorm, LayerNorm, GroupNorm and what follows it.

Shapes: B batch_size, C channels, G num_groups, H height, W width, N numbers of a group, N = C / G * H * W.
"""

import math

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.jax.layers import layer_norm
from gaugeblock.reference.jax.precision import at_least_float32


def rms_norm(hidden_states: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.norms.rms_norm`."""
    validation.rms_norm(hidden_states, weight, eps)
    inputs = at_least_float32(hidden_states)
    mean_square = (inputs * inputs).mean(axis=-1, keepdims=True)
    out = inputs * jax.lax.rsqrt(mean_square + eps) * at_least_float32(weight)
    return out.astype(hidden_states.dtype)


def layer_norm_affine(hidden_states: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.norms.layer_norm_affine`."""
    validation.layer_norm_affine(hidden_states, weight, bias, eps)
    normalized = layer_norm(at_least_float32(hidden_states), eps=eps)
    out = normalized * at_least_float32(weight) + at_least_float32(bias)
    return out.astype(hidden_states.dtype)


def group_norm(images: jax.Array, weight: jax.Array, bias: jax.Array, *, num_groups: int, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.norms.group_norm`."""
    validation.group_norm(images, weight, bias, num_groups, eps)
    groups_BGN = at_least_float32(images).reshape(images.shape[0], num_groups, math.prod(images.shape[1:]) // num_groups)
    normalized_BCHW = layer_norm(groups_BGN, eps=eps).reshape(images.shape)
    out_BCHW = normalized_BCHW * at_least_float32(weight)[:, None, None] + at_least_float32(bias)[:, None, None]
    return out_BCHW.astype(images.dtype)


def group_norm_silu(images: jax.Array, weight: jax.Array, bias: jax.Array, *, num_groups: int, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.norms.group_norm_silu`."""
    validation.group_norm(images, weight, bias, num_groups, eps)
    wide_BCHW, *parameters_C = (at_least_float32(each) for each in (images, weight, bias))
    out_BCHW = jax.nn.silu(group_norm(wide_BCHW, *parameters_C, num_groups=num_groups, eps=eps))
    return out_BCHW.astype(images.dtype)
