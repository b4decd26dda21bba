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
    """Apply the chosen SwiGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows.
        w2: [num_experts, hidden_size, intermediate_size].
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks or sizes do not fit together, or an id names no expert (not seen while traced).

    Source: the mixture is equation 1 of Shazeer et al. (arXiv:1701.06538); SwiGLU is equation 6 of Shazeer
    (arXiv:2002.05202), without biases; the layout of the weights is vLLM's.
    """
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
    """Multiply the first group of rows by the first matrix, the next group by the next, and so on.

        out[n] = weights[g] @ rows[n],  g = the group that row n lies in

    Args:
        rows: [num_rows, in_features], floating, sorted by group.
        weights: [num_groups, out_features, in_features], floating.
        group_sizes: [num_groups], integer, sums to num_rows.

    Returns:
        [num_rows, out_features], dtype of rows.
    """
    # Every row meets every matrix, since sizes must be static under jit: E times the twin's work. On the CPU
    # jax.lax.ragged_dot costs the same, and lets a NaN in one matrix into all rows; the two `where` keep it
    # out, forward and backward.
    group_N = jnp.repeat(jnp.arange(weights.shape[0]), group_sizes, total_repeat_length=rows.shape[0])
    inside_EN1 = (group_N == jnp.arange(weights.shape[0])[:, None])[..., None]
    masked_rows = jnp.where(inside_EN1, rows, 0)
    out = jnp.einsum("eni,eoi->eno", masked_rows, at_least_float32(weights), precision="highest")
    return jnp.where(inside_EN1, out, 0).sum(axis=0)
