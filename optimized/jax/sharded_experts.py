"""SwiGLU experts in JAX whose tokens are on every rank of a mesh, or come to it, and whose outputs are added up over the ranks.

`fused_swiglu_tensor_parallel`: every rank has all tokens and a slice of each expert. `fused_swiglu_replicated_tokens`: all
tokens and some of the experts. `fused_swiglu_gathered_tokens`: a part of the tokens and some of the experts; the tokens are
gathered, and each rank gets the sums of its own. `expert_parallel.py` sends tokens to their experts instead.

What the ranks add up are float32 sums over a token's choices; so are the gradients of tokens that several ranks had. Where the
ids are traced, a rank has room for all routed rows on one expert.

Shapes: T tokens that a rank has, or gets, E experts of one rank, K top_k, H hidden_size.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gaugeblock.optimized.jax.expert_parallel import swiglu_of_some
from gaugeblock.optimized.jax.experts import rounded_capacity
from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32

OF_GATE_AND_UP = PartitionSpec(None, None, "ranks")  # of w13 as [num_experts, gate or up, intermediate_size, hidden_size]
OF_COLUMNS = PartitionSpec(None, None, "ranks")


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
    mesh, load = _checked(hidden_states, w13, w2, topk_weights, topk_ids, mesh)
    num_experts, hidden_size, intermediate_size = w2.shape
    if intermediate_size % mesh.size:
        raise ValueError(f"intermediate_size must be a multiple of the ranks ({mesh.size}), got {intermediate_size}")
    halves = w13.reshape(num_experts, 2, intermediate_size, hidden_size)
    experts = (OF_GATE_AND_UP, OF_COLUMNS)
    inputs = _placed(mesh, REPLICATED, experts, hidden_states, halves, w2, topk_weights, topk_ids)
    return _summed(*inputs, mesh=mesh, load=load, experts=experts)


def fused_swiglu_replicated_tokens(
    hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """As `expert_parallel.fused_swiglu`, but every rank has all tokens; its experts are whole.

    Raises:
        TypeError, ValueError: As `expert_parallel.fused_swiglu`.

    Source: the layout is that of DeepSeek-V3's inference/model.py, MoE.
    """
    mesh, load = _checked(hidden_states, w13, w2, topk_weights, topk_ids, mesh)
    _require_whole_experts(w13, mesh)
    experts = (OVER_RANKS, OVER_RANKS)
    inputs = _placed(mesh, REPLICATED, experts, hidden_states, w13, w2, topk_weights, topk_ids)
    return _summed(*inputs, mesh=mesh, load=load, experts=experts)


def fused_swiglu_gathered_tokens(
    hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array, *, mesh: Mesh
) -> jax.Array:
    """As `expert_parallel.fused_swiglu`, but tokens go to every rank, and sums to the ranks of the tokens.

    Raises:
        TypeError, ValueError: As `expert_parallel.fused_swiglu`.

    Source: the exchange is that of Megatron-LM's MoEAllGatherTokenDispatcher.
    """
    mesh, load = _checked(hidden_states, w13, w2, topk_weights, topk_ids, mesh)
    _require_whole_experts(w13, mesh)
    by_token = REPLICATED if hidden_states.shape[0] % mesh.size else OVER_RANKS
    inputs = _placed(mesh, by_token, (OVER_RANKS, OVER_RANKS), hidden_states, w13, w2, topk_weights, topk_ids)
    return jax.device_put(_gathered(*inputs, mesh=mesh, load=load), NamedSharding(mesh, by_token))


def _checked(
    hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array, mesh: Mesh
) -> tuple[Mesh, int | None]:
    """Check the call; return the mesh and for how many rows of one expert a rank has room, None for a ragged product."""
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    mesh = mesh_of_ranks(mesh)
    if mesh.devices.flat[0].platform != "cpu":
        return mesh, None
    if isinstance(topk_ids, jax.core.Tracer):
        return mesh, max(1, topk_ids.size)
    rows_of_experts = np.bincount(np.asarray(topk_ids).astype(np.int64).reshape(-1), minlength=1)
    return mesh, rounded_capacity(max(1, int(rows_of_experts.max())))


def _placed(
    mesh: Mesh, tokens: PartitionSpec, experts: tuple[PartitionSpec, PartitionSpec], *inputs: jax.Array
) -> tuple[jax.Array, ...]:
    """Bring the arguments of a call to the ranks."""
    specs = (tokens, *experts, tokens, tokens)
    return jax.device_put(inputs, tuple(NamedSharding(mesh, each) for each in specs))


def _require_whole_experts(w13: jax.Array, mesh: Mesh) -> None:
    if w13.shape[0] % mesh.size:
        raise ValueError(f"num_experts must be a multiple of the ranks ({mesh.size}), got {w13.shape[0]}")


@partial(jax.jit, static_argnames=("mesh", "load", "experts"))
def _summed(
    hidden_states: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    mesh: Mesh,
    load: int | None,
    experts: tuple[PartitionSpec, PartitionSpec],
) -> jax.Array:
    """Run what each rank has of the experts on all tokens, and add up the ranks' sums; `experts` says how w13 and w2 lie."""

    def of_rank(hidden_TH, w13, w2, weights_TK, ids_TK):
        # from here on each rank has its own, whose gradients are added up over the ranks, in float32
        tokens = (at_least_float32(hidden_TH), at_least_float32(weights_TK), ids_TK)
        hidden, weights, ids = (jax.lax.pcast(each, "ranks", to="varying") for each in tokens)
        w13 = w13.reshape(w13.shape[0], -1, w13.shape[-1])
        first = jax.lax.axis_index("ranks") * (w13.shape[0] if experts[0] == OVER_RANKS else 0)
        return jax.lax.psum(_sums(hidden, w13, w2, weights, ids, first, load), "ranks").astype(hidden_TH.dtype)

    tokens = _padded(hidden_states, topk_weights, topk_ids, 0 if hidden_states.shape[0] else 1, w2.shape[0])
    of_rank = jax.shard_map(of_rank, mesh=mesh, in_specs=(REPLICATED, *experts, REPLICATED, REPLICATED), out_specs=REPLICATED)
    return of_rank(tokens[0], w13, w2, *tokens[1:])[: hidden_states.shape[0]]


@partial(jax.jit, static_argnames=("mesh", "load"))
def _gathered(
    hidden_states: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    topk_weights: jax.Array,
    topk_ids: jax.Array,
    *,
    mesh: Mesh,
    load: int | None,
) -> jax.Array:
    """Give every rank as many tokens, the last of which may have no expert; gather them, and send the ranks their sums."""

    def of_rank(hidden_TH, w13, w2, weights_TK, ids_TK):
        # in float32, though the dtype would do: the gradients that come back this way are not rounded yet
        tokens = (at_least_float32(hidden_TH), at_least_float32(weights_TK), ids_TK)
        hidden, weights, ids = (jax.lax.all_gather(each, "ranks", tiled=True) for each in tokens)
        first = jax.lax.axis_index("ranks") * w13.shape[0]
        out = _sums(hidden, w13, w2, weights, ids, first, load)
        return jax.lax.psum_scatter(out, "ranks", tiled=True).astype(hidden_TH.dtype)

    num_tokens = hidden_states.shape[0]
    padding = -num_tokens % mesh.size if num_tokens else mesh.size
    tokens = _padded(hidden_states, topk_weights, topk_ids, padding, w2.shape[0])
    of_rank = jax.shard_map(of_rank, mesh=mesh, in_specs=OVER_RANKS, out_specs=OVER_RANKS)
    return of_rank(tokens[0], w13, w2, *tokens[1:])[:num_tokens]


def _padded(
    hidden_states: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array, padding: int, no_expert: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add tokens that no expert gets."""
    rows = ((0, padding), (0, 0))
    ids = jnp.pad(topk_ids.astype(jnp.int32), rows, constant_values=no_expert)  # int8 may have no room for one id more
    return jnp.pad(hidden_states, rows), jnp.pad(topk_weights, rows), ids


def _sums(
    hidden_TH: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    weights_TK: jax.Array,
    ids_TK: jax.Array,
    first: jax.Array,
    load: int | None,
) -> jax.Array:
    """What this rank's experts, of which `first` is the first, give to each token; as hidden_TH and weights_TK, in float32."""
    num_experts = w13.shape[0]
    ids_TK = ids_TK - first
    here_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    weights_TK = jnp.where(here_TK, weights_TK, 0)
    return swiglu_of_some(hidden_TH, w13, w2, weights_TK, jnp.where(here_TK, ids_TK, num_experts), load)
