"""MoE layers in JAX over the ranks of a mesh: the experts lie there in one of the ways of `expert_parallel.py` and
`sharded_experts.py`; routers and the experts that all tokens pass are compiled for tokens as they lie.

Arrays are global. Each layer is the operation of its name in `gaugeblock.reference.jax`, with `mesh`, of one axis "ranks".
Where the experts that all tokens pass are added, all is computed in float32, operands of products too.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
from jax.sharding import Mesh, NamedSharding

from gaugeblock.optimized.jax import expert_parallel, sharded_experts
from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.jax.experts import gated_shared_swiglu
from gaugeblock.reference.jax.moe_layers import router_logits, shared_weights
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.routers import softmax_topk

Experts = Callable[..., jax.Array]
State = Mapping[str, jax.Array]
Layer = tuple[jax.Array, jax.Array, jax.Array]


def _qwen3_moe(experts: Experts, hidden_states: jax.Array, state: State, *, top_k: int, renormalize: bool, mesh: Mesh) -> Layer:
    """Route tokens where they lie, and send them to experts that are spread in a way."""
    validation.mixtral_moe(hidden_states, state, top_k)
    hidden_states, whole, routed = _placed(experts, hidden_states, state, mesh)
    logits_TE, weights_TK, ids_TK = _route(hidden_states, whole["gate.weight"], top_k=top_k, renormalize=renormalize)
    return experts(hidden_states, *routed, weights_TK, ids_TK, mesh=mesh), logits_TE, ids_TK


def _mixtral_moe(experts: Experts, hidden_states: jax.Array, state: State, *, top_k: int, mesh: Mesh) -> Layer:
    """The same, renormalized."""
    return _qwen3_moe(experts, hidden_states, state, top_k=top_k, renormalize=True, mesh=mesh)


def _qwen2_moe(experts: Experts, hidden_states: jax.Array, state: State, *, top_k: int, renormalize: bool, mesh: Mesh) -> Layer:
    """The same, and the gated expert that all tokens pass, where they lie."""
    validation.qwen2_moe(hidden_states, state, top_k)
    accurate = {name: at_least_float32(each) for name, each in state.items()}
    hidden_TH, whole, routed = _placed(experts, at_least_float32(hidden_states), accurate, mesh)
    logits_TE, weights_TK, ids_TK = _route(hidden_TH, whole["gate.weight"], top_k=top_k, renormalize=renormalize)
    out_TH = experts(hidden_TH, *routed, weights_TK, ids_TK, mesh=mesh) + _gated_shared(hidden_TH, whole)
    return out_TH.astype(hidden_states.dtype), logits_TE, ids_TK


@partial(jax.jit, static_argnames=("top_k", "renormalize"))
def _route(hidden_states: jax.Array, gate: jax.Array, *, top_k: int, renormalize: bool) -> Layer:
    """Return router_logits, topk_weights and topk_ids."""
    logits_TE = router_logits(hidden_states, gate)
    return logits_TE, *softmax_topk(logits_TE, top_k=top_k, renormalize=renormalize)


@jax.jit
def _gated_shared(hidden_states: jax.Array, state: State) -> jax.Array:
    return gated_shared_swiglu(hidden_states, *shared_weights(state, "shared_expert"), state["shared_expert_gate.weight"])


def _placed(
    experts: Experts, hidden_states: jax.Array, state: State, mesh: Mesh
) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Bring tokens where the experts want them, so that routers run there too, and to every rank what is not of the experts.

    Returns:
        Tokens; the parameters that every rank has; those of the experts, which these place.
    """
    mesh = mesh_of_ranks(mesh)
    splits = experts in SPLIT_TOKENS and hidden_states.shape[0] % mesh.size == 0
    tokens, everywhere = (NamedSharding(mesh, each) for each in (OVER_RANKS if splits else REPLICATED, REPLICATED))
    whole = {name: each for name, each in state.items() if not name.startswith("experts.")}
    routed = state["experts.gate_up_proj"], state["experts.down_proj"]
    return jax.device_put(hidden_states, tokens), jax.device_put(whole, everywhere), routed


SPLIT_TOKENS = (expert_parallel.fused_swiglu, sharded_experts.fused_swiglu_gathered_tokens)
mixtral_moe = partial(_mixtral_moe, expert_parallel.fused_swiglu)
qwen3_moe = partial(_qwen3_moe, expert_parallel.fused_swiglu)
qwen2_moe = partial(_qwen2_moe, expert_parallel.fused_swiglu)
qwen2_moe_gathered_tokens = partial(_qwen2_moe, sharded_experts.fused_swiglu_gathered_tokens)
qwen2_moe_replicated_tokens = partial(_qwen2_moe, sharded_experts.fused_swiglu_replicated_tokens)
qwen2_moe_tensor_parallel = partial(_qwen2_moe, sharded_experts.fused_swiglu_tensor_parallel)
