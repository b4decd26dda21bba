"""MoE layers that choose among groups of experts, and have shared experts beside them: DeepSeek-V2's and DeepSeek-V3's.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size.
"""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.jax.experts import fused_swiglu, shared_swiglu
from gaugeblock.reference.jax.moe_layers import router_logits, shared_weights
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.routers import grouped_sigmoid_topk, grouped_softmax_topk


def deepseek_v2_moe(
    hidden_states: jax.Array,
    state: Mapping[str, jax.Array],
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.grouped_moe_layers.deepseek_v2_moe`, but topk_ids are int32."""
    validation.deepseek_v2_moe(hidden_states, state, top_k, num_groups, topk_groups, routed_scaling_factor)

    hidden_TH, state = at_least_float32(hidden_states), {name: at_least_float32(each) for name, each in state.items()}
    logits_TE = router_logits(hidden_TH, state["gate.weight"])
    weights_TK, ids_TK = grouped_softmax_topk(
        logits_TE, top_k=top_k, num_groups=num_groups, topk_groups=topk_groups, routed_scaling_factor=1.0
    )
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(axis=-1, keepdims=True)
    out_TH = routed_and_shared(hidden_TH, state, weights_TK * routed_scaling_factor, ids_TK)
    return out_TH.astype(hidden_states.dtype), logits_TE, ids_TK


def deepseek_v3_moe(
    hidden_states: jax.Array,
    state: Mapping[str, jax.Array],
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.grouped_moe_layers.deepseek_v3_moe`, but topk_ids are int32."""
    validation.deepseek_v3_moe(hidden_states, state, top_k, num_groups, topk_groups, routed_scaling_factor)

    hidden_TH, state = at_least_float32(hidden_states), {name: at_least_float32(each) for name, each in state.items()}
    logits_TE = router_logits(hidden_TH, state["gate.weight"])
    weights_TK, ids_TK = grouped_sigmoid_topk(
        logits_TE,
        state["gate.e_score_correction_bias"],
        top_k=top_k,
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )
    out_TH = routed_and_shared(hidden_TH, state, weights_TK, ids_TK)
    return out_TH.astype(hidden_states.dtype), logits_TE, ids_TK


def routed_and_shared(
    hidden_states: jax.Array, state: Mapping[str, jax.Array], topk_weights: jax.Array, topk_ids: jax.Array
) -> jax.Array:
    """As `gaugeblock.reference.torch.grouped_moe_layers.routed_and_shared`."""
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    out_TH = fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    return out_TH + shared_swiglu(hidden_states, *shared_weights(state, "shared_experts"))
