"""MoE layers whose experts have biases: gpt-oss', and the one that replaces an MLP of GPT-2.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size, I intermediate_size.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.auxiliary_losses import expert_load
from gaugeblock.reference.torch.experts import fused_gelu_mlp, fused_swiglu_oai
from gaugeblock.reference.torch.moe_layers import router_logits
from gaugeblock.reference.torch.noisy_routers import ste_topk
from gaugeblock.reference.torch.routers import topk_softmax


def gpt_oss_moe(
    hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, top_k: int, alpha: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token through the `top_k` clamped SwiGLU experts that a linear router with a bias gives the highest logits.

        router_logits = hidden_states @ router.weight.T + router.bias
        topk_weights, topk_ids = topk_softmax(router_logits)
        out = fused_swiglu_oai(hidden_states, experts.gate_up_proj.mT, experts.gate_up_proj_bias,
                               experts.down_proj.mT, experts.down_proj_bias, topk_weights, topk_ids)

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the entries of `state` have its dtype.
        state: `router.weight` [num_experts, hidden_size], `router.bias` [num_experts]; `experts.gate_up_proj`
            [num_experts, hidden_size, 2 * intermediate_size], columns of gate and up in turn, beginning with gate, and
            `experts.gate_up_proj_bias` [num_experts, 2 * intermediate_size] in the same order; `experts.down_proj`
            [num_experts, intermediate_size, hidden_size], `experts.down_proj_bias` [num_experts, hidden_size].
        top_k: Experts per token, 1 to num_experts: `num_experts_per_tok` of the public configs.
        alpha: How steep the sigmoid is: `swiglu_alpha`, 1.702 in gpt-oss.
        limit: Where gate and up are clamped, above 0: `swiglu_limit`, 7 in gpt-oss.

    Returns:
        hidden_states_out: [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for
            float64 inputs) and rounded once.
        router_logits: [num_tokens, num_experts], float32 (float64 for float64 inputs), with the bias.
        topk_ids: [num_tokens, top_k], int64, by descending logit; equal ones in any order. A token with a NaN logit gets any
            distinct ids.

    Raises:
        TypeError: An array is not of the dtype above, `state` is not a dict of arrays, or an option is no number.
        ValueError: Ranks, sizes or devices do not fit together, `state` lacks an entry or has one too many, `top_k` is not in
            1..num_experts, or another option is not finite or, of `limit`, not positive.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, MLPBlock; names of `state` as in `GptOssMLP` of transformers 5.
    """
    validation.gpt_oss_moe(hidden_states, state, top_k, alpha, limit)

    logits_TE = router_logits(hidden_states, state["router.weight"]) + state["router.bias"]
    weights_TK, ids_TK = topk_softmax(logits_TE, top_k=top_k)
    up = state["experts.gate_up_proj"].mT, state["experts.gate_up_proj_bias"]
    down = state["experts.down_proj"].mT, state["experts.down_proj_bias"]
    out_TH = fused_swiglu_oai(hidden_states, *up, *down, weights_TK, ids_TK, alpha=alpha, limit=limit)
    return out_TH, logits_TE, ids_TK


def upcycled_gpt2_moe(
    hidden_states: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    noise: torch.Tensor,
    *,
    top_k: int,
    noise_std: float,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token through `top_k` experts, each an MLP of GPT-2, that a linear router with noise gives the highest logits.

        router_logits = hidden_states @ router.gate.weight.T
        topk_weights, topk_ids, router_probs, _, _, entropy = ste_topk(router_logits, noise)
        out = fused_gelu_mlp(hidden_states, experts.c_fc.weight.mT, experts.c_fc.bias,
                             experts.c_proj.weight.mT, experts.c_proj.bias, topk_weights, topk_ids), GELU by tanh
        load[e] = number of (t, j) with topk_ids[t, j] = e, over num_tokens * top_k

    One expert alone weighs just 1, and its gradient reaches the router through its probability (`ste_topk`). GPT-2's dropout,
    which in the public code each expert has before its weight, is left out.

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the entries of `state` have its dtype. Public tokens
            [batch_size, sequence_length, hidden_size] are flattened row by row.
        state: `router.gate.weight` [num_experts, hidden_size]; `experts.c_fc.weight`
            [num_experts, hidden_size, intermediate_size], `experts.c_fc.bias` [num_experts, intermediate_size],
            `experts.c_proj.weight` [num_experts, intermediate_size, hidden_size], `experts.c_proj.bias`
            [num_experts, hidden_size]. `upcycling.upcycle` makes it of a dense MLP.
        noise: [num_tokens, num_experts], any floating dtype; draws of a standard normal, or zeros. It gets no gradient.
        top_k: Experts per token, 1 to num_experts.
        noise_std: Deviation of the noise, as `noisy_routers.noise_std_at` has it; 0 or more.
        training: Whether there is noise, and a gradient through the weight of one expert alone.

    Returns:
        hidden_states_out: [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for
            float64 inputs) and rounded once. The rest, but for the ids, is of float32 (float64 for float64 inputs).
        router_logits: [num_tokens, num_experts], without noise, for the z-loss.
        topk_ids: [num_tokens, top_k], int64, by descending probability; equal ones in any order. A token with a NaN gets any
            distinct ids.
        router_probs: [num_tokens, num_experts], with noise in training, for the balance loss.
        entropy: [num_tokens], of the probabilities without noise, in nats.
        load: [num_experts], each expert's part of all assignments; 0 where there are no tokens.

    Raises:
        TypeError: An array is not of the dtype above, `state` is not a dict of arrays, or an option is of another kind.
        ValueError: Ranks, sizes or devices do not fit together, `state` lacks an entry or has one too many, `top_k` is not in
            1..num_experts, or `noise_std` is negative or not finite.

    Source: sumitdotml/moe-emergence, `moe_emergence/moe.py` and `moe_emergence/gpt2_moe.py`, whose experts are lists; names
    are theirs, but for the number of each expert.
    """
    validation.upcycled_gpt2_moe(hidden_states, state, noise, top_k, noise_std)

    logits_TE = router_logits(hidden_states, state["router.gate.weight"])
    routing = ste_topk(logits_TE, noise, top_k=top_k, noise_std=noise_std, training=training)
    weights_TK, ids_TK, probs_TE, _, _, entropy_T = routing
    up = state["experts.c_fc.weight"].mT, state["experts.c_fc.bias"]
    down = state["experts.c_proj.weight"].mT, state["experts.c_proj.bias"]
    out_TH = fused_gelu_mlp(hidden_states, *up, *down, weights_TK, ids_TK, approximate="tanh")
    return out_TH, logits_TE, ids_TK, probs_TE, entropy_T, load_fractions(ids_TK, logits_TE)


def load_fractions(topk_ids: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
    """Return each expert's part of all assignments, [num_experts], in the dtype of the logits; 0 where there are no tokens."""
    num_tokens, num_experts = router_logits.shape
    counted_T = torch.ones(num_tokens, dtype=torch.bool, device=topk_ids.device)
    load_E = expert_load(topk_ids, counted_T, num_experts=num_experts)
    return load_E.to(router_logits.dtype) / max(1, topk_ids.numel())
