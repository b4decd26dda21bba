"""Experts in JAX whose tokens are on every rank of a mesh, or come to it, and whose outputs are added up over the ranks.

`fused_swiglu_tensor_parallel`: every rank has all tokens and a slice of each expert. `fused_swiglu_replicated_tokens`: all
tokens and some of the experts. `fused_swiglu_gathered_tokens`: a part of the tokens and some of the experts; the tokens are
gathered, and each rank gets the sums of its own. `expert_parallel.py` sends tokens to their experts instead.

What the ranks add up are float32 sums over a token's choices; so are the gradients of tokens that several ranks had. Where the
ids are traced, a rank has room for all routed rows on one expert.

Shapes: T tokens that a rank has, or gets, E experts of one rank, K top_k, H hidden_size.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gaugeblock.optimized.jax import expert_calls
from gaugeblock.optimized.jax.expert_calls import Experts
from gaugeblock.optimized.jax.expert_parallel import require_whole_experts, sum_of_some
from gaugeblock.optimized.jax.experts import rounded_capacity
from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32


def fused_swiglu_tensor_parallel(
    hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """As `expert_parallel.fused_swiglu`, but every rank has all tokens and a slice of each expert.

    Its gate rows and its up rows are of the same intermediate features, whose number the ranks divide; so w13, whose halves are
    split, is brought to the ranks anew in each call unless it is sharded as [num_experts, 2, intermediate_size, hidden_size].

    Raises:
        TypeError, ValueError: As `expert_parallel.fused_swiglu`; the ranks divide intermediate_size instead of num_experts.

    Source: the slices are those of Megatron-LM (arXiv:1909.08053) section 3.
    """
    _check(hidden_states, w13, w2, topk_weights, topk_ids)
    return sum_tensor_parallel(hidden_states, expert_calls.swiglu(w13, w2), topk_weights, topk_ids, mesh=mesh)


def fused_swiglu_replicated_tokens(
    hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """As `expert_parallel.fused_swiglu`, but every rank has all tokens; its experts are whole.

    Raises:
        TypeError, ValueError: As `expert_parallel.fused_swiglu`.

    Source: the layout is that of DeepSeek-V3's inference/model.py, MoE.
    """
    _check(hidden_states, w13, w2, topk_weights, topk_ids)
    return sum_replicated_tokens(hidden_states, expert_calls.swiglu(w13, w2), topk_weights, topk_ids, mesh=mesh)


def fused_swiglu_gathered_tokens(
    hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """As `expert_parallel.fused_swiglu`, but tokens go to every rank, and sums to the ranks of the tokens.

    Raises:
        TypeError, ValueError: As `expert_parallel.fused_swiglu`.

    Source: the exchange is that of Megatron-LM's MoEAllGatherTokenDispatcher.
    """
    _check(hidden_states, w13, w2, topk_weights, topk_ids)
    return sum_gathered_tokens(hidden_states, expert_calls.swiglu(w13, w2), topk_weights, topk_ids, mesh=mesh)


def sum_tensor_parallel(
    hidden_states: jax.Array, experts: Experts, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """As `expert_parallel.sum_of_experts`, in slices; for `expert_calls.swiglu` alone."""
    mesh, load = mesh_of_ranks(mesh), _load(topk_ids, mesh)
    num_experts, hidden_size, intermediate_size = experts.down.shape
    if intermediate_size % mesh.size:
        raise ValueError(f"intermediate_size must be a multiple of the ranks ({mesh.size}), got {intermediate_size}")
    halves = replace(experts, up=experts.up.reshape(num_experts, 2, intermediate_size, hidden_size))
    inputs = _placed(mesh, REPLICATED, _slices(halves), hidden_states, halves, topk_weights, topk_ids)
    return _summed(*inputs, mesh=mesh, load=load, in_slices=True)


def sum_replicated_tokens(
    hidden_states: jax.Array, experts: Experts, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """As `expert_parallel.sum_of_experts`, where every rank has all tokens."""
    mesh, load = mesh_of_ranks(mesh), _load(topk_ids, mesh)
    require_whole_experts(experts, mesh)
    inputs = _placed(mesh, REPLICATED, OVER_RANKS, hidden_states, experts, topk_weights, topk_ids)
    return _summed(*inputs, mesh=mesh, load=load, in_slices=False)


def sum_gathered_tokens(
    hidden_states: jax.Array, experts: Experts, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """As `expert_parallel.sum_of_experts`, of tokens that go to every rank."""
    mesh, load = mesh_of_ranks(mesh), _load(topk_ids, mesh)
    require_whole_experts(experts, mesh)
    by_token = REPLICATED if hidden_states.shape[0] % mesh.size else OVER_RANKS
    inputs = _placed(mesh, by_token, OVER_RANKS, hidden_states, experts, topk_weights, topk_ids)
    return jax.device_put(_gathered(*inputs, mesh=mesh, load=load), NamedSharding(mesh, by_token))


def _check(hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array) -> None:
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])


def _load(topk_ids: jax.Array, mesh: Mesh) -> int | None:
    """Return for how many rows of one expert a rank has room, None for a ragged product."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    if isinstance(topk_ids, jax.core.Tracer):
        return max(1, topk_ids.size)
    rows_of_experts = np.bincount(np.asarray(topk_ids).astype(np.int64).reshape(-1), minlength=1)
    return rounded_capacity(max(1, int(rows_of_experts.max())))


def _placed(mesh: Mesh, tokens: PartitionSpec, experts: PartitionSpec | Experts, *inputs: Any) -> tuple[Any, ...]:
    """Bring the arguments of a call to the ranks."""
    return jax.device_put(inputs, jax.tree.map(partial(NamedSharding, mesh), (tokens, experts, tokens, tokens)))


def _slices(halves: Experts) -> Experts:
    """How slices lie, of experts whose w13 is [num_experts, gate or up, intermediate_size, hidden_size]."""
    features: Any = PartitionSpec(None, None, "ranks")
    return replace(halves, up=features, down=features)


@partial(jax.jit, static_argnames=("mesh", "load", "in_slices"))
def _summed(
    hidden_states: jax.Array,
    experts: Experts,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    mesh: Mesh,
    load: int | None,
    in_slices: bool,
) -> jax.Array:
    """Run what each rank has of the experts on all tokens, and add up the ranks' sums."""

    def of_rank(hidden_TH, experts, weights_TK, ids_TK):
        # from here on each rank has its own, whose gradients are added up over the ranks, in float32
        tokens = (at_least_float32(hidden_TH), at_least_float32(weights_TK), ids_TK)
        hidden, weights, ids = (jax.lax.pcast(each, "ranks", to="varying") for each in tokens)
        first = jax.lax.axis_index("ranks") * (0 if in_slices else experts.num_experts)
        experts = replace(experts, up=experts.up.reshape(experts.num_experts, -1, experts.up.shape[-1]))
        return jax.lax.psum(_sums(hidden, experts, weights, ids, first, load), "ranks").astype(hidden_TH.dtype)

    num_experts = experts.num_experts
    tokens = _padded(hidden_states, topk_weights, topk_ids, 0 if hidden_states.shape[0] else 1, num_experts)
    in_specs = (REPLICATED, _slices(experts) if in_slices else OVER_RANKS, REPLICATED, REPLICATED)
    of_rank = jax.shard_map(of_rank, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED)
    return of_rank(tokens[0], experts, *tokens[1:])[: hidden_states.shape[0]]


@partial(jax.jit, static_argnames=("mesh", "load"))
def _gathered(
    hidden_states: jax.Array,
    experts: Experts,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    mesh: Mesh,
    load: int | None,
) -> jax.Array:
    """Give every rank as many tokens, the last of which may have no expert; gather them, and send the ranks their sums."""

    def of_rank(hidden_TH, experts, weights_TK, ids_TK):
        # in float32, though the dtype would do: the gradients that come back this way are not rounded yet
        tokens = (at_least_float32(hidden_TH), at_least_float32(weights_TK), ids_TK)
        hidden, weights, ids = (jax.lax.all_gather(each, "ranks", tiled=True) for each in tokens)
        first = jax.lax.axis_index("ranks") * experts.num_experts
        out = _sums(hidden, experts, weights, ids, first, load)
        return jax.lax.psum_scatter(out, "ranks", tiled=True).astype(hidden_TH.dtype)

    num_tokens = hidden_states.shape[0]
    padding = -num_tokens % mesh.size if num_tokens else mesh.size
    tokens = _padded(hidden_states, topk_weights, topk_ids, padding, experts.num_experts)
    of_rank = jax.shard_map(of_rank, mesh=mesh, in_specs=OVER_RANKS, out_specs=OVER_RANKS)
    return of_rank(tokens[0], experts, *tokens[1:])[:num_tokens]


def _padded(
    hidden_states: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array, padding: int, no_expert: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add tokens that no expert gets."""
    rows = ((0, padding), (0, 0))
    ids = jnp.pad(topk_ids.astype(jnp.int32), rows, constant_values=no_expert)  # int8 may have no room for one id more
    return jnp.pad(hidden_states, rows), jnp.pad(topk_weights, rows), ids


def _sums(
    hidden_TH: jax.Array, experts: Experts, weights_TK: jax.Array, ids_TK: jax.Array, first: jax.Array, load: int | None
) -> jax.Array:
    """What this rank's experts, of which `first` is the first, give to each token; as hidden_TH and weights_TK, in float32."""
    num_experts = experts.num_experts
    ids_TK = ids_TK - first
    here_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    weights_TK = jnp.where(here_TK, weights_TK, 0)
    return sum_of_some(hidden_TH, experts, weights_TK, jnp.where(here_TK, ids_TK, num_experts), load)
