"""MoE layers: a router and its experts in one.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size, I intermediate_size.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.experts import fused_swiglu
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.routers import softmax_topk


def mixtral_moe(
    hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token through the `top_k` SwiGLU experts that a linear router gives the highest probability.

        router_logits = hidden_states @ gate.weight.T
        topk_weights, topk_ids = softmax_topk(router_logits), renormalized
        out = fused_swiglu(hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids)

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the entries of `state` have its dtype.
        state: `gate.weight` [num_experts, hidden_size]; `experts.gate_up_proj`
            [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows; `experts.down_proj`
            [num_experts, hidden_size, intermediate_size].
        top_k: Experts per token, 1 to num_experts.

    Returns:
        hidden_states_out: [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for
            float64 inputs) and rounded once.
        router_logits: [num_tokens, num_experts], float32 (float64 for float64 inputs), for the losses below.
        topk_ids: [num_tokens, top_k], int64, by descending probability; equal ones in any order. A token with
            a NaN logit gets any distinct ids.

    Raises:
        TypeError: An array is not of the dtype above, or `state` is not a dict of arrays.
        ValueError: Ranks, sizes or devices do not fit together, `state` lacks an entry or has one too many, or
            `top_k` is not in 1..num_experts.

    Source: Mixtral of Experts (arXiv:2401.04088), section 2.1; names of `state` as in transformers 5.
    """
    validation.mixtral_moe(hidden_states, state, top_k)

    gate_EH = at_least_float32(state["gate.weight"])
    logits_TE = at_least_float32(hidden_states) @ gate_EH.mT
    weights_TK, ids_TK = softmax_topk(logits_TE, top_k=top_k, renormalize=True)
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    return fused_swiglu(hidden_states, w13, w2, weights_TK, ids_TK), logits_TE, ids_TK
