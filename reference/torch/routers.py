"""Routers: which experts a token goes to, and with what weights.

Shapes: T num_tokens, E num_experts, K top_k, G num_groups, M experts in one group.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.precision import at_least_float32


def softmax_topk(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` most probable experts of each token.

        p = softmax(router_logits)
        ids = top_k(p)
        weights = p[ids]                if not renormalize
        weights = p[ids] / sum(p[ids])  if renormalize

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        top_k: Experts per token, 1 to num_experts.
        renormalize: Whether the weights of a token sum to 1.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending probability; equal ones in any order. A token
            with a NaN logit gets any distinct ids.

    Raises:
        TypeError: `router_logits` is not a floating array, or `top_k` not an integer.
        ValueError: `router_logits` is not of rank 2, or `top_k` is not in 1..num_experts.

    Source: Mixtral of Experts (arXiv:2401.04088), section 2.1, renormalized; OLMoE (arXiv:2409.02060),
    section 2, not renormalized.
    """
    validation.softmax_topk(router_logits, top_k)

    probs_TE = torch.softmax(at_least_float32(router_logits), dim=-1)
    ids_TK = torch.topk(probs_TE, top_k, dim=-1).indices
    weights_TK = probs_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, ids_TK


def grouped_sigmoid_topk(
    router_logits: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose `top_k` experts of each token from its best `topk_groups` groups, balanced by a bias.

        s = sigmoid(router_logits)
        c = s + e_score_correction_bias               (for the choice only)
        kept = top_k_groups(group_scores(c))
        ids = top_k(c, or -inf where not kept)
        weights = s[ids] * routed_scaling_factor                          if not renormalize
        weights = s[ids] / (sum(s[ids]) + 1e-20) * routed_scaling_factor  if renormalize

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        e_score_correction_bias: [num_experts], floating, usually float32. It gets no gradient.
        top_k: Experts per token, 1 to topk_groups * num_experts / num_groups.
        num_groups: Groups of consecutive experts; divides num_experts.
        topk_groups: Groups a token may choose from, 1 to num_groups.
        renormalize: Whether the weights of a token sum to routed_scaling_factor.
        routed_scaling_factor: Multiplies every weight.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending c; equal ones in any order. A token
            with a NaN logit gets any distinct ids.

    Raises:
        TypeError: `router_logits` or `e_score_correction_bias` is not a floating array, or an option is of another kind.
        ValueError: A rank or size is wrong, `num_groups` does not divide num_experts, or `topk_groups` or
            `top_k` is more than there is to choose from, or `routed_scaling_factor` is not finite.

    Source: DeepSeek-V3 Technical Report (arXiv:2412.19437), section 2.1.2; the 1e-20 is of the public model's
    `MoEGate`.
    """
    validation.grouped_sigmoid_topk(router_logits, e_score_correction_bias, top_k, num_groups, topk_groups, routed_scaling_factor)

    choice_scores_TE = sigmoid_choice_scores(router_logits, e_score_correction_bias)
    best_groups = torch.topk(group_scores(choice_scores_TE, num_groups), topk_groups, dim=-1).indices
    kept_TG = torch.nn.functional.one_hot(best_groups, num_groups).any(dim=1)
    kept_TE = kept_TG.repeat_interleave(choice_scores_TE.shape[1] // num_groups, dim=1)
    ids_TK = torch.topk(choice_scores_TE.masked_fill(~kept_TE, -torch.inf), top_k, dim=-1).indices

    scores_TE = torch.sigmoid(at_least_float32(router_logits))
    weights_TK = scores_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * routed_scaling_factor, ids_TK


def sigmoid_choice_scores(router_logits: torch.Tensor, e_score_correction_bias: torch.Tensor) -> torch.Tensor:
    """Return what experts are chosen by, c = sigmoid(router_logits) + bias, [num_tokens, num_experts]."""
    return torch.sigmoid(at_least_float32(router_logits)) + at_least_float32(e_score_correction_bias)


def group_scores(choice_scores: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the sum of the two highest scores of each group (of its only one), [num_tokens, num_groups]."""
    scores_TGM = choice_scores.unflatten(-1, (num_groups, choice_scores.shape[1] // num_groups))
    return torch.topk(scores_TGM, min(2, scores_TGM.shape[-1]), dim=-1).values.sum(dim=-1)
