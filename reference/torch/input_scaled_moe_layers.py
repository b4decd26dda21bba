"""MoE layers whose routers weigh what experts are given, not what they return: Llama 4's.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.experts import shared_swiglu
from gaugeblock.reference.torch.moe_building import input_scaled_swiglu
from gaugeblock.reference.torch.moe_layers import router_logits, shared_weights
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.routers import sigmoid_input_scaling


def llama4_moe(
    hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token, scaled, through the `top_k` experts of its highest logits, and as it is through the shared expert.

        router_logits = hidden_states @ router.weight.T
        topk_weights, topk_ids = sigmoid_input_scaling(router_logits)
        out = input_scaled_swiglu(hidden_states, experts.gate_up_proj.mT, experts.down_proj.mT, topk_weights, topk_ids)
              + shared_swiglu(hidden_states, shared_expert.{gate, up, down}_proj.weight)

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the entries of `state` have its dtype.
        state: `router.weight` [num_experts, hidden_size]; `experts.gate_up_proj`
            [num_experts, hidden_size, 2 * intermediate_size], gate columns, then up columns; `experts.down_proj`
            [num_experts, intermediate_size, hidden_size]; `shared_expert.gate_proj.weight` and
            `shared_expert.up_proj.weight` [shared_intermediate_size, hidden_size], `shared_expert.down_proj.weight`
            [hidden_size, shared_intermediate_size], as wide as an expert in the public models.
        top_k: Experts per token, 1 to num_experts: num_experts_per_tok of the public configs, 1 in all of them.

    Returns:
        hidden_states_out: [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for
            float64 inputs) and rounded once.
        router_logits: [num_tokens, num_experts], float32 (float64 for float64 inputs).
        topk_ids: [num_tokens, top_k], int64, by descending logit; equal ones in any order. A token with
            a NaN logit gets any distinct ids.

    Raises:
        TypeError: An array is not of the dtype above, or `state` is not a dict of arrays.
        ValueError: Ranks, sizes or devices do not fit together, `state` lacks an entry or has one too many, or
            `top_k` is not in 1..num_experts.

    Source: Llama 4 (`Llama4TextMoe` of transformers 5, whose names those of `state` are).
    """
    validation.llama4_moe(hidden_states, state, top_k)

    hidden_TH, state = at_least_float32(hidden_states), {name: at_least_float32(each) for name, each in state.items()}
    logits_TE = router_logits(hidden_TH, state["router.weight"])
    weights_TK, ids_TK = sigmoid_input_scaling(logits_TE, top_k=top_k)
    w13, w2 = state["experts.gate_up_proj"].mT, state["experts.down_proj"].mT
    out_TH = input_scaled_swiglu(hidden_TH, w13, w2, weights_TK, ids_TK)
    out_TH = out_TH + shared_swiglu(hidden_TH, *shared_weights(state, "shared_expert"))
    return out_TH.to(hidden_states.dtype), logits_TE, ids_TK
