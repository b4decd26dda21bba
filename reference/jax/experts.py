"""Experts: each token passes the feed-forward networks that its router chose; their outputs are added up.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size, I intermediate_size.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32


def fused_swiglu(
    hidden_states: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.fused_swiglu`."""
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    expert_N = topk_ids.flatten()
    order_N = expert_N.argsort(stable=True)
    group_sizes_E = jnp.bincount(expert_N, length=w13.shape[0])

    hidden_NH = at_least_float32(hidden_states).repeat(topk_ids.shape[1], axis=0)[order_N]
    gate_NI, up_NI = jnp.split(grouped_matmul(hidden_NH, w13, group_sizes_E), 2, axis=-1)
    out_NH = grouped_matmul(jax.nn.silu(gate_NI) * up_NI, w2, group_sizes_E)
    out_TKH = out_NH[order_N.argsort()].reshape(*topk_ids.shape, hidden_states.shape[1])
    out_TH = (at_least_float32(topk_weights)[..., None] * out_TKH).sum(axis=1)
    return out_TH.astype(hidden_states.dtype)


def grouped_matmul(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.grouped_matmul`."""
    # Every row meets every matrix, since sizes must be static under jit: E times the twin's work. On the CPU
    # jax.lax.ragged_dot costs the same, and lets a NaN in one matrix into all rows; the two `where` keep it
    # out, forward and backward.
    group_N = jnp.repeat(jnp.arange(weights.shape[0]), group_sizes, total_repeat_length=rows.shape[0])
    inside_EN1 = (group_N == jnp.arange(weights.shape[0])[:, None])[..., None]
    masked_rows = jnp.where(inside_EN1, rows, 0)
    out = jnp.einsum("eni,eoi->eno", masked_rows, at_least_float32(weights), precision="highest")
    return jnp.where(inside_EN1, out, 0).sum(axis=0)
