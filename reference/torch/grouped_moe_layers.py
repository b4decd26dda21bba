"""MoE layers that choose among groups of experts, and have shared experts beside them: DeepSeek-V2's and DeepSeek-V3's.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.experts import fused_swiglu, shared_swiglu
from gaugeblock.reference.torch.moe_layers import router_logits, shared_weights
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.routers import grouped_sigmoid_topk, grouped_softmax_topk


def deepseek_v2_moe(
    hidden_states: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token through the `top_k` most probable experts of its best groups, and through the shared experts.

        router_logits = hidden_states @ gate.weight.T
        topk_weights, topk_ids = grouped_softmax_topk(router_logits), divided by their sum if renormalize, * routed_scaling_factor
        out = fused_swiglu(hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids)
              + shared_swiglu(hidden_states, shared_experts.{gate, up, down}_proj.weight)

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the entries of `state` have its dtype.
        state: `gate.weight` [num_experts, hidden_size]; `experts.gate_up_proj`
            [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows; `experts.down_proj`
            [num_experts, hidden_size, intermediate_size]; `shared_experts.gate_proj.weight` and
            `shared_experts.up_proj.weight` [shared_intermediate_size, hidden_size], `shared_experts.down_proj.weight`
            [hidden_size, shared_intermediate_size]. All shared experts are one expert, n_shared_experts *
            moe_intermediate_size wide; it has neither a gate nor the scaling factor.
        top_k: Experts per token, 1 to topk_groups * num_experts / num_groups: num_experts_per_tok of the public configs.
        num_groups: Groups of consecutive experts, n_group; divides num_experts. 1 for the topk_method "greedy".
        topk_groups: Groups a token may choose from, topk_group, 1 to num_groups.
        renormalize: Whether the chosen probabilities are divided by their sum: norm_topk_prob, false in DeepSeek-V2's.
        routed_scaling_factor: Multiplies every weight of a routed expert, renormalized or not; of the same name.

    Returns:
        hidden_states_out: [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for
            float64 inputs) and rounded once.
        router_logits: [num_tokens, num_experts], float32 (float64 for float64 inputs).
        topk_ids: [num_tokens, top_k], int64, by descending probability; equal ones in any order. A token with
            a NaN logit gets any distinct ids.

    Raises:
        TypeError: An array is not of the dtype above, `state` is not a dict of arrays, or an option is of another kind.
        ValueError: Ranks, sizes or devices do not fit together, `state` lacks an entry or has one too many, `num_groups` does
            not divide num_experts, `topk_groups` or `top_k` is more than there is to choose from, or
            `routed_scaling_factor` is not finite.

    Source: DeepSeek-V2 (arXiv:2405.04434) section 2.1; names of `state` as in transformers 5 (`DeepseekV2Moe`). Where
    norm_topk_prob is true, transformers ignores it, and the code beside the checkpoints leaves the scaling factor out.
    """
    validation.deepseek_v2_moe(hidden_states, state, top_k, num_groups, topk_groups, routed_scaling_factor)

    hidden_TH, state = at_least_float32(hidden_states), {name: at_least_float32(each) for name, each in state.items()}
    logits_TE = router_logits(hidden_TH, state["gate.weight"])
    weights_TK, ids_TK = grouped_softmax_topk(
        logits_TE, top_k=top_k, num_groups=num_groups, topk_groups=topk_groups, routed_scaling_factor=1.0
    )
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    out_TH = routed_and_shared(hidden_TH, state, weights_TK * routed_scaling_factor, ids_TK)
    return out_TH.to(hidden_states.dtype), logits_TE, ids_TK


def deepseek_v3_moe(
    hidden_states: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token through `top_k` experts of its best groups, balanced by a bias, and through the shared experts.

        router_logits = hidden_states @ gate.weight.T
        topk_weights, topk_ids = grouped_sigmoid_topk(router_logits, gate.e_score_correction_bias)
        out = fused_swiglu(hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids)
              + shared_swiglu(hidden_states, shared_experts.{gate, up, down}_proj.weight)

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the entries of `state` have its dtype, but the bias.
        state: As of `deepseek_v2_moe`, and `gate.e_score_correction_bias` [num_experts], floating, usually float32: a buffer,
            which gets no gradient.
        top_k: Experts per token, 1 to topk_groups * num_experts / num_groups: num_experts_per_tok of the public configs.
        num_groups: Groups of consecutive experts, n_group; divides num_experts.
        topk_groups: Groups a token may choose from, topk_group, 1 to num_groups.
        renormalize: Whether the weights of a token sum to routed_scaling_factor: norm_topk_prob.
        routed_scaling_factor: Multiplies every weight of a routed expert; of the same name.

    Returns:
        hidden_states_out, router_logits: as `deepseek_v2_moe`.
        topk_ids: [num_tokens, top_k], int64, by descending sigmoid plus bias; equal ones in any order. A token with
            a NaN logit gets any distinct ids.

    Raises: as `deepseek_v2_moe`.

    Source: DeepSeek-V3 Technical Report (arXiv:2412.19437) section 2.1.2; names of `state` as in transformers 5
    (`DeepseekV3MoE`). Kimi-K2, GLM-4.5 and LLaDA2 have the same layer.
    """
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
    return out_TH.to(hidden_states.dtype), logits_TE, ids_TK


def routed_and_shared(
    hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """Return what the chosen experts and the shared ones make of the tokens, added up, [num_tokens, hidden_size]."""
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    out_TH = fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    return out_TH + shared_swiglu(hidden_states, *shared_weights(state, "shared_experts"))
