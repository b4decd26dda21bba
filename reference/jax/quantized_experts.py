"""Experts whose weights are held in eight bits, beside scales.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size, I intermediate_size, F gate and up
together (2 * I).
"""

import jax
import jax.numpy as jnp
from jax.nn import silu

from gaugeblock.reference import validation
from gaugeblock.reference.jax.experts import grouped_matmul, sum_of_experts
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.quantization import dequantize_blocks, quantized_and_back


def fused_swiglu_int8(
    hidden_states: jax.Array,
    w13: jax.Array,
    w13_scales: jax.Array,
    w2: jax.Array,
    w2_scales: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
) -> jax.Array:
    """As `gaugeblock.reference.torch.quantized_experts.fused_swiglu_int8`."""
    validation.fused_swiglu_int8(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    hidden_TH = at_least_float32(hidden_states)
    w13_EFH = w13_scales.astype(hidden_TH.dtype)[..., None] * w13
    w2_EHI = w2_scales.astype(hidden_TH.dtype)[..., None] * w2

    def int8_experts(hidden_NH: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        gate_NI, up_NI = jnp.split(grouped_matmul(hidden_NH, w13_EFH, group_sizes_E), 2, axis=-1)
        return grouped_matmul(silu(gate_NI) * up_NI, w2_EHI, group_sizes_E)

    out_TH = sum_of_experts(int8_experts, hidden_TH, topk_weights, topk_ids, num_experts=w13.shape[0])
    return out_TH.astype(hidden_states.dtype)


def fused_swiglu_fp8(
    hidden_states: jax.Array,
    w13: jax.Array,
    w13_scales: jax.Array,
    w2: jax.Array,
    w2_scales: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    block_size: int,
) -> jax.Array:
    """As `gaugeblock.reference.torch.quantized_experts.fused_swiglu_fp8`."""
    validation.fused_swiglu_fp8(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids, block_size)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    hidden_TH = at_least_float32(hidden_states)
    w13_EFH = dequantize_blocks(w13, w13_scales.astype(hidden_TH.dtype), block_size)
    w2_EHI = dequantize_blocks(w2, w2_scales.astype(hidden_TH.dtype), block_size)

    def fp8_experts(hidden_NH: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        gate_up_NF = grouped_matmul(quantized_and_back(hidden_NH, block_size), w13_EFH, group_sizes_E)
        gate_NI, up_NI = jnp.split(gate_up_NF, 2, axis=-1)
        return grouped_matmul(quantized_and_back(silu(gate_NI) * up_NI, block_size), w2_EHI, group_sizes_E)

    out_TH = sum_of_experts(fp8_experts, hidden_TH, topk_weights, topk_ids, num_experts=w13.shape[0])
    return jax.lax.stop_gradient(out_TH.astype(hidden_states.dtype))
