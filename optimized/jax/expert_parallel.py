"""Expert-parallel experts in JAX: tokens travel to the ranks that hold their experts, and results back.

Every rank of the mesh holds a part of the tokens and a part of the experts, and

1. sends each of its tokens to every rank that holds one of the token's experts, once per rank;
2. runs its experts on the tokens that came, and adds up what they give for each token;
3. sends the sums back, and adds up the sums that return for its own tokens, in the order of the ranks.

XLA compiles for fixed sizes, so a rank has room for the same number of tokens from every other: for as many
as any two ranks exchange, rounded up. Where the ids are traced, that is all tokens of a rank, and step 1 moves
what an all-gather would. `jax.lax.ragged_all_to_all` would move no padding; XLA has none for the CPU.

Shapes: R ranks, T tokens of one rank, P pairs of a rank and a token (R * T), C capacity: room for tokens from
one rank, S slots for tokens from all (R * C), E experts of one rank, K top_k, N routed rows of one rank
(S * K), L load: room for rows of one expert, H hidden_size, I intermediate_size; X is any size.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gaugeblock.optimized.jax import expert_calls
from gaugeblock.optimized.jax.expert_calls import Experts
from gaugeblock.optimized.jax.experts import move_rows, padded_experts, ragged_experts, rounded_capacity
from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.jax.precision import at_least_float32


def fused_swiglu(
    hidden_states: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    mesh: Mesh,
) -> jax.Array:
    """Apply the chosen SwiGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Arrays are global; those that do not lie on the ranks of the mesh yet are brought there. Outside of jit,
    every new rounded capacity or load is a compilation.

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype. Sharded over the tokens,
            where num_tokens is a multiple of the ranks, else replicated until it is padded.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows; sharded over the experts.
        w2: [num_experts, hidden_size, intermediate_size]; sharded over the experts.
        topk_weights: [num_tokens, top_k], floating, usually float32; sharded as hidden_states.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1; sharded as hidden_states. An id that
            comes twice counts twice.
        mesh: One axis, "ranks", whose size divides num_experts.

    Returns:
        [num_tokens, hidden_size], dtype and sharding as hidden_states; accumulated in float32 (float64 for float64
        inputs), from operands that have the dtype of hidden_states on accelerators.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `mesh` is not a mesh.
        ValueError: Ranks or sizes do not fit together, or an id names no expert (not seen while traced).

    Source: Lepikhin et al. 2020 (arXiv:2006.16668), section 3.3, without its limit on the tokens of an expert.
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    return sum_of_experts(hidden_states, expert_calls.swiglu(w13, w2), topk_weights, topk_ids, mesh=mesh)


def fused_geglu(
    hidden_states: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    approximate: GeluApproximation,
    mesh: Mesh,
) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.fused_geglu`, spread and raising as `fused_swiglu`."""
    validation.fused_geglu(hidden_states, w13, w2, topk_weights, topk_ids, approximate)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    return sum_of_experts(hidden_states, expert_calls.geglu(w13, w2, approximate), topk_weights, topk_ids, mesh=mesh)


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
    mesh: Mesh,
) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.fused_gelu_mlp`, spread and raising as `fused_swiglu`; biases lie as matrices."""
    validation.fused_gelu_mlp(hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, approximate)
    validation.expert_ids_in_range(topk_ids, num_experts=w1.shape[0])
    return sum_of_experts(hidden_states, expert_calls.gelu_mlp(w1, b1, w2, b2, approximate), topk_weights, topk_ids, mesh=mesh)


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
    mesh: Mesh,
) -> jax.Array:
    """As `gaugeblock.reference.torch.experts.fused_swiglu_oai`, spread and raising as `fused_swiglu`; biases lie as matrices."""
    validation.fused_swiglu_oai(hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, alpha, limit)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    experts = expert_calls.swiglu_oai(w13, b13, w2, b2, alpha, limit)
    return sum_of_experts(hidden_states, experts, topk_weights, topk_ids, mesh=mesh)


def sum_of_experts(
    hidden_states: jax.Array, experts: Experts, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """Run the chosen experts, of whatever kind, on each token, and add up their weighted outputs.

    Args: as of `fused_swiglu`, of which only the mesh and the number of experts are checked; experts may have another dtype than
        hidden_states, which the result has, and are the operands of products on accelerators.
    """
    mesh = mesh_of_ranks(mesh)
    require_whole_experts(experts, mesh)
    capacity, load = capacity_and_load(topk_ids, mesh.size, num_experts=experts.num_experts)
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    by_token = NamedSharding(mesh, REPLICATED if hidden_states.shape[0] % mesh.size else OVER_RANKS)
    by_expert = NamedSharding(mesh, OVER_RANKS)
    inputs = jax.device_put((hidden_states, experts, topk_weights, topk_ids), (by_token, by_expert, by_token, by_token))
    out = over_ranks(*inputs, mesh=mesh, capacity=capacity, load=load if is_cpu else None)
    return jax.device_put(out, by_token)


def require_whole_experts(experts: Experts, mesh: Mesh) -> None:
    if experts.num_experts % mesh.size:
        raise ValueError(f"num_experts must be a multiple of the ranks ({mesh.size}), got {experts.num_experts}")


def capacity_and_load(topk_ids: jax.Array, num_ranks: int, num_experts: int) -> tuple[int, int]:
    """Return for how many tokens of one rank another must have room, and for how many rows of one expert."""
    num_tokens, top_k = topk_ids.shape
    tokens_of_rank = max(1, -(-num_tokens // num_ranks))
    rows = num_ranks * tokens_of_rank * top_k
    if isinstance(topk_ids, jax.core.Tracer):
        return tokens_of_rank, rows

    expert_TK = np.asarray(topk_ids).astype(np.int64)
    rank_TK = expert_TK // (num_experts // num_ranks)
    wanted_TR = (rank_TK[:, :, None] == np.arange(num_ranks)).any(axis=1)
    sent_RR = np.add.reduceat(wanted_TR, np.arange(0, num_tokens, tokens_of_rank), dtype=np.int64)
    group_sizes_E = np.bincount(expert_TK.reshape(-1), minlength=num_experts)
    capacity = rounded_capacity(int(sent_RR.max(initial=1)))
    return min(capacity, tokens_of_rank), min(rounded_capacity(int(group_sizes_E.max(initial=1))), rows)


@partial(jax.jit, static_argnames=("mesh", "capacity", "load"))
def over_ranks(
    hidden_states: jax.Array,
    experts: Experts,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    mesh: Mesh,
    capacity: int,
    load: int | None,
) -> jax.Array:
    """Give every rank as many tokens, the last of which may have no expert, and run `sum_on_rank` on each.

    Args: as of `sum_of_experts`, and
        capacity: Room for tokens from one rank to another.
        load: Room for rows of one expert in a padded product; None for a ragged product, which needs no such limit.
    """
    num_tokens = hidden_states.shape[0]
    padding = -num_tokens % mesh.size if num_tokens else mesh.size

    def padded(array_TX: jax.Array, value: int = 0) -> jax.Array:
        return jnp.pad(array_TX, ((0, padding), (0, 0)), constant_values=value)

    topk_ids = padded(topk_ids.astype(jnp.int32), experts.num_experts)  # int8 may have no room for one id more
    of_rank = partial(sum_on_rank, capacity=capacity, load=load)
    of_rank = jax.shard_map(of_rank, mesh=mesh, in_specs=OVER_RANKS, out_specs=OVER_RANKS)
    return of_rank(padded(hidden_states), experts, padded(topk_weights), topk_ids)[:num_tokens]


def sum_on_rank(
    hidden_TH: jax.Array,
    experts: Experts,
    weights_TK: jax.Array,
    ids_TK: jax.Array,
    *,
    capacity: int,
    load: int | None,
) -> jax.Array:
    """Run the three steps on one rank: its tokens, its experts, and ids that count the experts of all ranks."""
    num_ranks, num_experts = jax.lax.axis_size("ranks"), experts.num_experts
    (num_tokens, hidden_size), top_k = hidden_TH.shape, ids_TK.shape[1]
    ids_RTK = ids_TK - num_experts * jnp.arange(num_ranks, dtype=jnp.int32)[:, None, None]
    there_RTK = (ids_RTK >= 0) & (ids_RTK < num_experts)
    slot_P = slots(there_RTK.any(axis=2), capacity).reshape(-1)
    pair_S = inverse(slot_P, num_ranks * capacity)

    ids_PK = jnp.where(there_RTK, ids_RTK, num_experts).reshape(slot_P.size, top_k)
    ids_SK = exchange(ids_PK.at[pair_S].get(mode="fill", fill_value=num_experts))
    weights_PK = jnp.where(there_RTK, at_least_float32(weights_TK), 0).reshape(slot_P.size, top_k)
    weights_SK = exchange(move_rows(weights_PK, pair_S, slot_P))
    # in float32, though the dtype would do: the gradients that come back this way are not rounded yet
    hidden_PH = jnp.tile(at_least_float32(hidden_TH), (num_ranks, 1))
    hidden_SH = exchange(move_rows(hidden_PH, pair_S, slot_P))

    out_SH = sum_of_some(hidden_SH, experts, weights_SK, ids_SK, load)
    out_RTH = move_rows(exchange(out_SH), slot_P, pair_S).reshape(num_ranks, num_tokens, hidden_size)
    return out_RTH.sum(axis=0).astype(hidden_TH.dtype)


def sum_of_some(hidden_SH: jax.Array, experts: Experts, weights_SK: jax.Array, ids_SK: jax.Array, load: int | None) -> jax.Array:
    """Run every expert on its own rows, and no expert on those of id num_experts, whose weights are zero."""
    if load is None:
        return ragged_experts(hidden_SH, experts, weights_SK, ids_SK)
    num_experts = experts.num_experts
    slot_N = slots(ids_SK.reshape(-1) == jnp.arange(num_experts)[:, None], load).min(axis=0)
    row_EL = inverse(slot_N, num_experts * load).reshape(num_experts, load)
    return padded_experts(hidden_SH, experts, weights_SK, row_EL, slot_N)


def exchange(rows_SX: jax.Array) -> jax.Array:
    """Send the r-th part of the rows to rank r; the r-th part of what returns came from rank r."""
    return jax.lax.all_to_all(rows_SX, "ranks", split_axis=0, concat_axis=0, tiled=True)


def slots(wanted_GX: jax.Array, capacity: int) -> jax.Array:
    """Number what each group wants, as [num_groups * capacity]; what it does not want is out of that range."""
    num_groups = wanted_GX.shape[0]
    place_GX = jnp.cumsum(wanted_GX, axis=1, dtype=jnp.int32) - 1
    first_G1 = capacity * jnp.arange(num_groups, dtype=jnp.int32)[:, None]
    return jnp.where(wanted_GX, first_G1 + place_GX, num_groups * capacity)


def inverse(slot_X: jax.Array, num_slots: int) -> jax.Array:
    """Return what lies in each slot, [num_slots]; in a free one, the size of `slot_X`."""
    items_X = jnp.arange(slot_X.size, dtype=jnp.int32)
    return jnp.full(num_slots, slot_X.size, jnp.int32).at[slot_X].set(items_X, mode="drop")
