"""MoE layers: a router and its experts in one.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size, I intermediate_size.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.experts import fused_swiglu, gated_shared_swiglu
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
        router_logits: [num_tokens, num_experts], float32 (float64 for float64 inputs), for `auxiliary_losses`.
        topk_ids: [num_tokens, top_k], int64, by descending probability; equal ones in any order. A token with
            a NaN logit gets any distinct ids.

    Raises:
        TypeError: An array is not of the dtype above, or `state` is not a dict of arrays.
        ValueError: Ranks, sizes or devices do not fit together, `state` lacks an entry or has one too many, or
            `top_k` is not in 1..num_experts.

    Source: Mixtral of Experts (arXiv:2401.04088), section 2.1; names of `state` as in transformers 5.
    """
    return qwen3_moe(hidden_states, state, top_k=top_k, renormalize=True)


def qwen3_moe(
    hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token through the `top_k` SwiGLU experts that a linear router gives the highest probability.

        router_logits = hidden_states @ gate.weight.T
        topk_weights, topk_ids = softmax_topk(router_logits)
        out = fused_swiglu(hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids)

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the entries of `state` have its dtype.
        state: As of `mixtral_moe`.
        top_k: Experts per token, 1 to num_experts.
        renormalize: Whether the chosen probabilities are divided by their sum: `norm_topk_prob` of the public configs, true
            in Qwen3-MoE's and SDAR-MoE's checkpoints, false in OLMoE's.

    Returns: as `mixtral_moe`.

    Raises: as `mixtral_moe`.

    Source: Qwen3 (arXiv:2505.09388) section 2, `Qwen3MoeSparseMoeBlock` of transformers; OLMoE (arXiv:2409.02060) section 2;
        SDAR (arXiv:2510.06303), whose layer is Qwen3's.
    """
    validation.mixtral_moe(hidden_states, state, top_k)

    logits_TE = router_logits(hidden_states, state["gate.weight"])
    weights_TK, ids_TK = softmax_topk(logits_TE, top_k=top_k, renormalize=renormalize)
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    return fused_swiglu(hidden_states, w13, w2, weights_TK, ids_TK), logits_TE, ids_TK


def qwen2_moe(
    hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add to what `qwen3_moe` computes an expert that all tokens pass, as far as a gate of each token is open.

        shared = sigmoid(shared_expert_gate.weight @ hidden_states[t]) * swiglu of shared_expert.{gate, up, down}_proj.weight
        out = qwen3_moe(hidden_states) + shared

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the entries of `state` have its dtype.
        state: As of `mixtral_moe`, and `shared_expert.gate_proj.weight` and `shared_expert.up_proj.weight`
            [shared_intermediate_size, hidden_size], `shared_expert.down_proj.weight` [hidden_size, shared_intermediate_size],
            `shared_expert_gate.weight` [1, hidden_size].
        top_k: Experts per token, 1 to num_experts.
        renormalize: Whether the chosen probabilities are divided by their sum: `norm_topk_prob`, false in the public
            checkpoints.

    Returns: as `mixtral_moe`.

    Raises: as `mixtral_moe`.

    Source: Qwen2 (arXiv:2407.10671) section 2.2.2, `Qwen2MoeSparseMoeBlock` of transformers.
    """
    validation.qwen2_moe(hidden_states, state, top_k)

    hidden_TH, state = at_least_float32(hidden_states), {name: at_least_float32(each) for name, each in state.items()}
    logits_TE = router_logits(hidden_TH, state["gate.weight"])
    weights_TK, ids_TK = softmax_topk(logits_TE, top_k=top_k, renormalize=renormalize)
    out_TH = fused_swiglu(hidden_TH, state["experts.gate_up_proj"], state["experts.down_proj"], weights_TK, ids_TK)
    shared = shared_weights(state, "shared_expert")
    out_TH = out_TH + gated_shared_swiglu(hidden_TH, *shared, state["shared_expert_gate.weight"])
    return out_TH.to(hidden_states.dtype), logits_TE, ids_TK


def router_logits(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what a linear router says of each token, [num_tokens, num_experts], in float32 at least."""
    return at_least_float32(hidden_states) @ at_least_float32(weight).mT


def shared_weights(state: Mapping[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w13 and w2 of the expert that all tokens pass."""
    w13 = torch.cat([state[f"{prefix}.gate_proj.weight"], state[f"{prefix}.up_proj.weight"]])
    return w13, state[f"{prefix}.down_proj.weight"]
