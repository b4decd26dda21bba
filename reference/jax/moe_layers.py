"""MoE layers: a router and its experts in one.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size, I intermediate_size.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.experts import fused_swiglu, gated_shared_swiglu
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.routers import softmax_topk


def mixtral_moe(
    hidden_states: jax.Array, state: Mapping[str, jax.Array], *, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.moe_layers.mixtral_moe`, but topk_ids are int32."""
    return qwen3_moe(hidden_states, state, top_k=top_k, renormalize=True)


def qwen3_moe(
    hidden_states: jax.Array, state: Mapping[str, jax.Array], *, top_k: int, renormalize: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.moe_layers.qwen3_moe`, but topk_ids are int32."""
    validation.mixtral_moe(hidden_states, state, top_k)

    logits_TE = router_logits(hidden_states, state["gate.weight"])
    weights_TK, ids_TK = softmax_topk(logits_TE, top_k=top_k, renormalize=renormalize)
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    return fused_swiglu(hidden_states, w13, w2, weights_TK, ids_TK), logits_TE, ids_TK


def qwen2_moe(
    hidden_states: jax.Array, state: Mapping[str, jax.Array], *, top_k: int, renormalize: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.moe_layers.qwen2_moe`, but topk_ids are int32."""
    validation.qwen2_moe(hidden_states, state, top_k)

    hidden_TH, state = at_least_float32(hidden_states), {name: at_least_float32(each) for name, each in state.items()}
    logits_TE = router_logits(hidden_TH, state["gate.weight"])
    weights_TK, ids_TK = softmax_topk(logits_TE, top_k=top_k, renormalize=renormalize)
    out_TH = fused_swiglu(hidden_TH, state["experts.gate_up_proj"], state["experts.down_proj"], weights_TK, ids_TK)
    shared = shared_weights(state, "shared_expert")
    out_TH = out_TH + gated_shared_swiglu(hidden_TH, *shared, state["shared_expert_gate.weight"])
    return out_TH.astype(hidden_states.dtype), logits_TE, ids_TK


def router_logits(hidden_states: jax.Array, weight: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.moe_layers.router_logits`."""
    return jnp.matmul(at_least_float32(hidden_states), at_least_float32(weight).mT, precision="highest")


def shared_weights(state: Mapping[str, jax.Array], prefix: str) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.moe_layers.shared_weights`."""
    w13 = jnp.concatenate([state[f"{prefix}.gate_proj.weight"], state[f"{prefix}.up_proj.weight"]])
    return w13, state[f"{prefix}.down_proj.weight"]
