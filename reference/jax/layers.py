"""Layers that the diffusion models share: modulation, attention, feed-forward, embeddings, patches.

Shapes: B batch_size, S tokens of a sequence, D hidden_size, I intermediate_size, A num_heads, F features of a head,
C channels, H height, W width, P patch_size, Y and X rows and columns of patches (S = Y * X).
"""

import math

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.precision import at_least_float32

LONGEST_PERIOD = 10000  # of both sinusoidal embeddings, in units of 2 pi


def layer_norm_modulate(hidden_states: jax.Array, shift: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """As `gaugeblock.reference.torch.layers.layer_norm_modulate`."""
    validation.layer_norm_modulate(hidden_states, shift, scale, eps)
    normalized_BSD = layer_norm(at_least_float32(hidden_states), eps=eps)
    out_BSD = normalized_BSD * (1 + at_least_float32(scale)[:, None]) + at_least_float32(shift)[:, None]
    return out_BSD.astype(hidden_states.dtype)


def gated_residual(residual: jax.Array, branch: jax.Array, gate: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.layers.gated_residual`."""
    validation.gated_residual(residual, branch, gate)
    out_BSD = at_least_float32(residual) + at_least_float32(gate)[:, None] * at_least_float32(branch)
    return out_BSD.astype(residual.dtype)


def gated_residual_layer_norm_modulate(
    residual: jax.Array,
    branch: jax.Array,
    gate: jax.Array,
    shift: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.layers.gated_residual_layer_norm_modulate`."""
    validation.gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps)
    hidden_BSD = gated_residual(at_least_float32(residual), at_least_float32(branch), at_least_float32(gate))
    modulated_BSD = layer_norm_modulate(hidden_BSD, at_least_float32(shift), at_least_float32(scale), eps=eps)
    return hidden_BSD.astype(residual.dtype), modulated_BSD.astype(residual.dtype)


def layer_norm(hidden_states: jax.Array, *, eps: float) -> jax.Array:
    """Normalize the last axis to mean 0 and variance 1; [..., hidden_size], dtype as hidden_states."""
    # two passes: E[x**2] - E[x]**2 loses (mean / deviation)**2 of the digits
    centred = hidden_states - hidden_states.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


def linear(inputs: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Multiply the last axis by a matrix [out_features, in_features] and add a bias [out_features], if there is one."""
    out = jnp.matmul(inputs, weight.mT, precision="highest")
    return out if bias is None else out + bias


def self_attention(
    hidden_states: jax.Array,
    qkv_weight: jax.Array,
    qkv_bias: jax.Array,
    proj_weight: jax.Array,
    proj_bias: jax.Array,
    *,
    num_heads: int,
) -> jax.Array:
    """As `gaugeblock.reference.torch.layers.self_attention`."""
    validation.self_attention(hidden_states, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads)
    qkv_BS3D = linear(at_least_float32(hidden_states), at_least_float32(qkv_weight), at_least_float32(qkv_bias))
    query_BASF, key_BASF, value_BASF = (split_heads(each, num_heads) for each in jnp.split(qkv_BS3D, 3, axis=-1))
    attended_BSD = join_heads(attention(query_BASF, key_BASF, value_BASF))
    out_BSD = linear(attended_BSD, at_least_float32(proj_weight), at_least_float32(proj_bias))
    return out_BSD.astype(hidden_states.dtype)


def gelu_mlp(
    hidden_states: jax.Array,
    fc1_weight: jax.Array,
    fc1_bias: jax.Array,
    fc2_weight: jax.Array,
    fc2_bias: jax.Array,
) -> jax.Array:
    """As `gaugeblock.reference.torch.layers.gelu_mlp`."""
    validation.gelu_mlp(hidden_states, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    inner_BSI = linear(at_least_float32(hidden_states), at_least_float32(fc1_weight), at_least_float32(fc1_bias))
    out_BSD = linear(gelu(inner_BSI), at_least_float32(fc2_weight), at_least_float32(fc2_bias))
    return out_BSD.astype(hidden_states.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Return x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))), dtype as x."""
    # sigmoid(2y) is (1 + tanh(y)) / 2 without its cancellation: JAX' gradient of tanh(y), g + g * tanh(y), loses it near y = -3
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


def timestep_embedding(timesteps: jax.Array, *, embedding_size: int, frequency_shift: int) -> jax.Array:
    """As `gaugeblock.reference.torch.layers.timestep_embedding`."""
    validation.timestep_embedding(timesteps, embedding_size, frequency_shift)
    half = embedding_size // 2
    index_F = jnp.arange(half, dtype=timesteps.dtype)
    frequency_F = jnp.exp(-math.log(LONGEST_PERIOD) * index_F / (half - frequency_shift))
    angle_BF = timesteps[:, None] * frequency_F
    return jnp.concatenate([jnp.cos(angle_BF), jnp.sin(angle_BF)], axis=-1)


def sincos_position_embedding(grid_size: int, *, like: jax.Array, spacing: float = 1.0) -> jax.Array:
    """As `gaugeblock.reference.torch.layers.sincos_position_embedding`."""
    validation.sincos_position_embedding(grid_size, like)
    quarter = like.shape[-1] // 4
    with jax.enable_x64(True):
        index_F = jnp.arange(quarter, dtype=jnp.float64)
        place_Y = spacing * jnp.arange(grid_size, dtype=jnp.float64)
        angle_YF = place_Y[:, None] * jnp.exp(-math.log(LONGEST_PERIOD) * index_F / quarter)
        sincos_YF = jnp.concatenate([jnp.sin(angle_YF), jnp.cos(angle_YF)], axis=-1).astype(like.dtype)
    column_SF, row_SF = jnp.tile(sincos_YF, (grid_size, 1)), jnp.repeat(sincos_YF, grid_size, axis=0)
    return jnp.concatenate([column_SF, row_SF], axis=-1)


def patchify(images: jax.Array, *, patch_size: int) -> jax.Array:
    """As `gaugeblock.reference.torch.layers.patchify`."""
    validation.patchify(images, patch_size)
    batch_size, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    tiles_BCYPXP = images.reshape(batch_size, channels, rows, patch_size, columns, patch_size)
    tiles_BYXCPP = tiles_BCYPXP.transpose(0, 2, 4, 1, 3, 5)
    return tiles_BYXCPP.reshape(batch_size, rows * columns, channels * patch_size**2)


def unpatchify(patches: jax.Array, *, patch_size: int, num_rows: int | None = None) -> jax.Array:
    """As `gaugeblock.reference.torch.layers.unpatchify`."""
    validation.unpatchify(patches, patch_size, num_rows)
    rows = math.isqrt(patches.shape[1]) if num_rows is None else num_rows
    columns = rows if num_rows is None else patches.shape[1] // num_rows
    channels = patches.shape[2] // patch_size**2
    tiles_BYXPPC = patches.reshape(patches.shape[0], rows, columns, patch_size, patch_size, channels)
    tiles_BCYPXP = tiles_BYXPPC.transpose(0, 5, 1, 3, 2, 4)
    return tiles_BCYPXP.reshape(patches.shape[0], channels, rows * patch_size, columns * patch_size)
