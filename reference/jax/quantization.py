"""Quantization: numbers held in eight bits, beside scales that tell what they stand for.

Shapes: T num_tokens, H hidden_size, C groups of columns, G group_size.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import E4M3_MAX
from gaugeblock.reference.jax.precision import at_least_float32, through_e4m3, to_e4m3


def quantize_token_groups(hidden_states: jax.Array, *, group_size: int) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.quantization.quantize_token_groups`."""
    validation.quantize_token_groups(hidden_states, group_size)
    quotients_TH, scales_TC = quotients_and_scales(at_least_float32(hidden_states), group_size)
    return to_e4m3(quotients_TH), scales_TC


def quotients_and_scales(hidden_states: jax.Array, group_size: int) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.quantization.quotients_and_scales`."""
    num_tokens, hidden_size = hidden_states.shape
    num_groups = -(-hidden_size // group_size)
    padded = jnp.pad(hidden_states, ((0, 0), (0, num_groups * group_size - hidden_size)))
    hidden_TCG = padded.reshape(num_tokens, num_groups, group_size)
    # a NaN is told apart: among 128 columns, XLA on a CPU loses it (jaxlib 0.10.2)
    largest_TC = jnp.where(jnp.isnan(hidden_TCG).any(axis=-1), jnp.nan, jnp.abs(hidden_TCG).max(axis=-1))
    scales_TC = largest_TC / E4M3_MAX
    quotients_TCG = hidden_TCG / jnp.where(scales_TC == 0, 1.0, scales_TC)[..., None]
    return quotients_TCG.reshape(padded.shape)[:, :hidden_size], scales_TC


def quantized_and_back(hidden_states: jax.Array, group_size: int) -> jax.Array:
    """As `gaugeblock.reference.torch.quantization.quantized_and_back`."""
    quotients_TH, scales_TC = quotients_and_scales(hidden_states, group_size)
    scales_TH = scales_TC.repeat(group_size, axis=1)[:, : hidden_states.shape[1]]
    return through_e4m3(quotients_TH) * scales_TH


def dequantize_blocks(quantized: jax.Array, scales: jax.Array, block_size: int) -> jax.Array:
    """As `gaugeblock.reference.torch.quantization.dequantize_blocks`."""
    rows, columns = quantized.shape[1:]
    of_rows = scales.repeat(block_size, axis=1)[:, :rows]
    return quantized.astype(scales.dtype) * of_rows.repeat(block_size, axis=2)[:, :, :columns]
