"""Experts in JAX: a ragged product on accelerators, a padded batched one on the CPU.

XLA compiles for fixed sizes, and the number of rows of an expert depends on the data:

- on accelerators `jax.lax.ragged_dot` takes the sizes as data;
- on the CPU ragged_dot multiplies every row with every expert (21 times the time of the padded product, with
  32 experts), so the rows are laid out as [num_experts, capacity], where the capacity is the load of the
  fullest expert, rounded up. That needs the ids on the host. Where they are traced, the reference takes over:
  it does the work of ragged_dot too, but lets no NaN pass from one expert to another.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), C capacity, H hidden_size,
I intermediate_size; D and O are the features that a product takes and gives.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gaugeblock.optimized.jax.expert_calls import Experts, swiglu
from gaugeblock.reference import validation
from gaugeblock.reference.jax import experts as reference
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

    On the CPU, outside of jit, every new rounded capacity is a compilation.

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows.
        w2: [num_experts, hidden_size, intermediate_size].
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; accumulated in float32 (float64 for float64
        inputs), from operands that have the dtype of hidden_states on accelerators.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks or sizes do not fit together, or an id names no expert (not seen while traced).

    Source: gaugeblock.reference.jax.experts.fused_swiglu.
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    return sum_of_experts(hidden_states, swiglu(w13, w2), topk_weights, topk_ids)


def sum_of_experts(hidden_states: jax.Array, experts: Experts, topk_weights: jax.Array, topk_ids: jax.Array) -> jax.Array:
    """Run the chosen experts, of whatever kind, on each token, and add up their weighted outputs.

    Args: as of `fused_swiglu`, unchecked; experts may have another dtype than hidden_states, which the result has.
    """
    inputs = (hidden_states, experts, topk_weights, topk_ids)
    if isinstance(topk_ids, jax.core.Tracer):
        return jax.lax.platform_dependent(*inputs, cpu=_rows_with_every_expert, default=ragged_experts)
    if jnp.asarray(topk_ids).devices().pop().platform != "cpu":
        return ragged_experts(*inputs)
    row_EC, slot_N = slots_by_expert(np.asarray(topk_ids), num_experts=experts.num_experts)
    return padded_experts(hidden_states, experts, topk_weights, row_EC, slot_N)


def slots_by_expert(topk_ids: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Give every routed row a slot in [num_experts, capacity], in the order of the tokens.

    Returns:
        row_EC: The routed row in each slot, token * top_k + j; in a free slot, num_tokens * top_k.
        slot_N: The slot of each routed row, expert * capacity + place.
    """
    expert_N = topk_ids.reshape(-1).astype(np.int64)  # int8 ids times a capacity would wrap
    order_N = np.argsort(expert_N, kind="stable")
    group_sizes_E = np.bincount(expert_N, minlength=num_experts)
    capacity = rounded_capacity(int(group_sizes_E.max(initial=0)))
    place_N = np.arange(expert_N.size) - np.repeat(group_sizes_E.cumsum() - group_sizes_E, group_sizes_E)

    slot_N = np.empty(expert_N.size, np.int32)
    slot_N[order_N] = expert_N[order_N] * capacity + place_N
    row_EC = np.full(num_experts * capacity, expert_N.size, np.int32)
    row_EC[slot_N] = np.arange(expert_N.size)
    return row_EC.reshape(num_experts, capacity), slot_N


def rounded_capacity(load: int) -> int:
    """Round a load up, to a multiple of 16 or of a sixteenth of it: padding against compilations."""
    step = max(16, 2 ** load.bit_length() // 32)
    return -(-load // step) * step


@jax.jit
def padded_experts(
    hidden_states: jax.Array, experts: Experts, topk_weights: jax.Array, row_EC: jax.Array, slot_N: jax.Array
) -> jax.Array:
    """Run every expert on `capacity` rows; a free slot is a row of zeros, with weight zero."""
    hidden_NH = jnp.repeat(at_least_float32(hidden_states), topk_weights.shape[1], axis=0)
    weights_N1 = at_least_float32(topk_weights).reshape(-1, 1)
    hidden_ECH, weights_EC1 = (move_rows(each, row_EC, slot_N) for each in (hidden_NH, weights_N1))
    used_EC1 = (row_EC < slot_N.size).astype(weights_N1.dtype)[..., None]
    out_ECH = experts.outputs(hidden_ECH, weights_EC1, used_EC1, batched_matmul)
    out_NH = move_rows(out_ECH.reshape(row_EC.size, hidden_states.shape[1]), slot_N, row_EC)
    return sum_of_choices(out_NH, topk_weights.shape, hidden_states.dtype)


@jax.jit
def ragged_experts(hidden_states: jax.Array, experts: Experts, topk_weights: jax.Array, topk_ids: jax.Array) -> jax.Array:
    """Run every expert on its own rows, sorted by expert; rows of id num_experts, which come last, on none."""
    expert_N = topk_ids.flatten()
    order_N = expert_N.argsort(stable=True)
    rank_N = order_N.argsort()
    group_sizes_E = jnp.bincount(expert_N, length=experts.num_experts)
    used_N1 = (expert_N[order_N] < experts.num_experts)[:, None]

    def multiply(rows_NX: jax.Array, weights: jax.Array) -> jax.Array:
        # ragged_dot does not say what it leaves in rows of no group: `where` drops it, forward and backward
        return jnp.where(used_N1, ragged_matmul(jnp.where(used_N1, rows_NX, 0), weights, group_sizes_E), 0)

    hidden_NH = jnp.repeat(at_least_float32(hidden_states), topk_ids.shape[1], axis=0)
    weights_N1 = at_least_float32(topk_weights).reshape(-1, 1)
    hidden_NH, weights_N1 = (move_rows(each, order_N, rank_N) for each in (hidden_NH, weights_N1))
    out_NH = experts.outputs(hidden_NH, weights_N1, used_N1.astype(weights_N1.dtype), multiply)
    return sum_of_choices(move_rows(out_NH, rank_N, order_N), topk_ids.shape, hidden_states.dtype)


def _rows_with_every_expert(
    hidden_states: jax.Array, experts: Experts, topk_weights: jax.Array, topk_ids: jax.Array
) -> jax.Array:
    """As the reference, which multiplies every row with every expert."""

    def weighted_once(rows_NH: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        ones_N1 = jnp.ones_like(rows_NH, shape=(rows_NH.shape[0], 1))
        return experts.outputs(rows_NH, ones_N1, ones_N1, partial(reference.grouped_matmul, group_sizes=group_sizes_E))

    return reference.sum_of_experts(weighted_once, hidden_states, topk_weights, topk_ids, num_experts=experts.num_experts)


@jax.custom_vjp
def move_rows(rows: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Return rows[source], zero where source is out of range; target is the inverse of source.

    The inverse makes the gradient a gather too: XLA's scatter on the CPU adds row by row in one thread.
    """
    return rows.at[source].get(mode="fill", fill_value=0)


def _move_rows_forward(rows, source, target):
    return move_rows(rows, source, target), (source, target)


def _move_rows_backward(residuals, grad):
    source, target = residuals
    grad = grad.reshape(source.size, grad.shape[-1])
    return move_rows(grad, target.reshape(-1), source), None, None


move_rows.defvjp(_move_rows_forward, _move_rows_backward)


def sum_of_choices(out_NH: jax.Array, num_tokens_and_top_k: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Add up the rows of each token, [num_tokens, hidden_size]."""
    return out_NH.reshape(*num_tokens_and_top_k, out_NH.shape[1]).sum(axis=1).astype(dtype)


def batched_matmul(rows_ECD: jax.Array, weights_EOD: jax.Array) -> jax.Array:
    """Multiply the rows of every expert by its matrix, [num_experts, capacity, out_features]."""
    return jnp.einsum("ecd,eod->eco", rows_ECD, at_least_float32(weights_EOD), precision="highest")


@jax.custom_vjp
def ragged_matmul(rows_ND: jax.Array, weights_EOD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """Multiply each row by its expert's matrix, [num_rows, out_features].

    Rows, result and the gradient of the rows are float32 at least, operands have the dtype of the weights;
    ragged_dot's own gradient would be rounded to the dtype of its operand before a token's rows are added up.
    """
    return _ragged_dot(rows_ND, weights_EOD, group_sizes_E, weights_EOD.dtype, contract=(1, 2))


def _ragged_matmul_forward(rows_ND, weights_EOD, group_sizes_E):
    return ragged_matmul(rows_ND, weights_EOD, group_sizes_E), (rows_ND, weights_EOD, group_sizes_E)


def _ragged_matmul_backward(residuals, grad_NO):
    rows_ND, weights_EOD, group_sizes_E = residuals
    dtype = weights_EOD.dtype
    grad_ND = _ragged_dot(grad_NO, weights_EOD, group_sizes_E, dtype, contract=(1, 1))
    grad_EOD = _ragged_dot(grad_NO, rows_ND, group_sizes_E, dtype, contract=(0, 0))
    return grad_ND, grad_EOD.astype(dtype), None


ragged_matmul.defvjp(_ragged_matmul_forward, _ragged_matmul_backward)


def _ragged_dot(
    left: jax.Array, right: jax.Array, group_sizes: jax.Array, dtype: jnp.dtype, contract: tuple[int, int]
) -> jax.Array:
    """Contract an axis of each, group by group; (0, 0) contracts the rows, which gives a matrix per group."""
    axes = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if contract[0] == 0 else [0],
    )
    return jax.lax.ragged_dot_general(
        left.astype(dtype),
        right.astype(dtype),
        group_sizes,
        axes,
        precision="highest",
        preferred_element_type=jnp.promote_types(dtype, jnp.float32),
    )
