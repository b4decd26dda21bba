"""Experts: each token passes the feed-forward networks that its router chose; their outputs are added up.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size, I intermediate_size, F gate and up
together (2 * I).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import silu
from jax.scipy.special import erfc

from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation
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

    def swiglu_experts(hidden_NH: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        gate_NI, up_NI = jnp.split(grouped_matmul(hidden_NH, w13, group_sizes_E), 2, axis=-1)
        return grouped_matmul(silu(gate_NI) * up_NI, w2, group_sizes_E)

    return sum_of_experts(swiglu_experts, hidden_states, topk_weights, topk_ids, num_experts=w13.shape[0])


def fused_geglu(
    hidden_states: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    approximate: GeluApproximation,
) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.fused_geglu`."""
    validation.fused_geglu(hidden_states, w13, w2, topk_weights, topk_ids, approximate)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    def geglu_experts(hidden_NH: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        gate_NI, up_NI = jnp.split(grouped_matmul(hidden_NH, w13, group_sizes_E), 2, axis=-1)
        return grouped_matmul(gelu(gate_NI, approximate) * up_NI, w2, group_sizes_E)

    return sum_of_experts(geglu_experts, hidden_states, topk_weights, topk_ids, num_experts=w13.shape[0])


def fused_gelu_mlp(
    hidden_states: jax.Array,
    w1: jax.Array,
    b1: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    approximate: GeluApproximation,
) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.fused_gelu_mlp`."""
    validation.fused_gelu_mlp(hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, approximate)
    validation.expert_ids_in_range(topk_ids, num_experts=w1.shape[0])

    def gelu_experts(hidden_NH: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        inner_NI = grouped_linear(hidden_NH, w1, b1, group_sizes_E)
        return grouped_linear(gelu(inner_NI, approximate), w2, b2, group_sizes_E)

    return sum_of_experts(gelu_experts, hidden_states, topk_weights, topk_ids, num_experts=w1.shape[0])


def fused_swiglu_oai(
    hidden_states: jax.Array,
    w13: jax.Array,
    b13: jax.Array,
    w2: jax.Array,
    b2: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    alpha: float,
    limit: float,
) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.fused_swiglu_oai`."""
    validation.fused_swiglu_oai(hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, alpha, limit)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    def swiglu_oai_experts(hidden_NH: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        gate_up_NF = grouped_linear(hidden_NH, w13, b13, group_sizes_E)
        return grouped_linear(clamped_swiglu(gate_up_NF, alpha=alpha, limit=limit), w2, b2, group_sizes_E)

    return sum_of_experts(swiglu_oai_experts, hidden_states, topk_weights, topk_ids, num_experts=w13.shape[0])


def shared_swiglu(hidden_states: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.shared_swiglu`."""
    validation.shared_swiglu(hidden_states, w13, w2)
    out_TH = swiglu(at_least_float32(hidden_states), at_least_float32(w13), at_least_float32(w2))
    return out_TH.astype(hidden_states.dtype)


def gated_shared_swiglu(hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, shared_gate: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.gated_shared_swiglu`."""
    validation.gated_shared_swiglu(hidden_states, w13, w2, shared_gate)
    hidden_TH = at_least_float32(hidden_states)
    open_T1 = jax.nn.sigmoid(jnp.matmul(hidden_TH, at_least_float32(shared_gate).mT, precision="highest"))
    out_TH = open_T1 * swiglu(hidden_TH, at_least_float32(w13), at_least_float32(w2))
    return out_TH.astype(hidden_states.dtype)


def gelu(x: jax.Array, approximate: GeluApproximation) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.gelu`."""
    if approximate == "tanh":
        return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x / 2 * erfc(-x / math.sqrt(2))


def clamped_swiglu(gate_up: jax.Array, *, alpha: float, limit: float) -> jax.Array:
    """Return the activation of gpt-oss, `fused_swiglu_oai`, of rows that hold gate and up in turn."""
    gate_NI, up_NI = gate_up[..., 0::2].clip(max=limit), gate_up[..., 1::2].clip(-limit, limit)
    return gate_NI * jax.nn.sigmoid(alpha * gate_NI) * (up_NI + 1)


def swiglu(rows: jax.Array, w13: jax.Array, w2: jax.Array) -> jax.Array:
    """Return w2 @ (silu(gate) * up) of each row, gate and up being the halves of w13 @ row."""
    gate_TI, up_TI = jnp.split(jnp.matmul(rows, w13.mT, precision="highest"), 2, axis=-1)
    return jnp.matmul(silu(gate_TI) * up_TI, w2.mT, precision="highest")


def sum_of_experts(
    experts: Callable[[jax.Array, jax.Array], jax.Array],
    hidden_states: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    num_experts: int,
) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.sum_of_experts`."""
    expert_N = topk_ids.flatten()
    order_N = expert_N.argsort(stable=True)
    group_sizes_E = jnp.bincount(expert_N, length=num_experts)

    hidden_NH = at_least_float32(hidden_states).repeat(topk_ids.shape[1], axis=0)[order_N]
    out_NH = experts(hidden_NH, group_sizes_E)
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


def grouped_linear(rows: jax.Array, weights: jax.Array, biases: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """As `grouped_matmul`, with a bias of each group, [num_groups, out_features], added."""
    bias_rows = jnp.repeat(at_least_float32(biases), group_sizes, axis=0, total_repeat_length=rows.shape[0])
    return grouped_matmul(rows, weights, group_sizes) + bias_rows
