"""Losses and figures of a router's load.

Shapes: T num_tokens, E num_experts, K top_k; of sequences, B batch_size, T sequence_length.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import ScoreFunction
from gaugeblock.reference.torch.precision import at_least_float32


def load_balancing_loss(router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the load-balancing loss of one layer: 1 where all experts have the same load, num_experts / top_k at worst.

        loss = num_experts * sum over e of share[e] * probability[e]
        share[e] = part of all assignments, top_k per token, that chose expert e; no gradient
        probability[e] = mean over tokens of softmax(router_logits)[e]

    Only tokens of the mask count; where there are none, the loss and its gradient are 0.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype; where masked, any values, NaN too.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1.
        attention_mask: [num_tokens], bool, False for padding.

    Returns:
        [], float32 (float64 for float64 logits).

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or an id names no expert.

    Source: Switch Transformers (arXiv:2101.03961), equations 4 to 6, of which share is that of top_k = 1.
    transformers' `load_balancing_loss_func` divides assignments by tokens: its loss is top_k times this one.
    """
    validation.load_balancing_loss(router_logits, topk_ids, attention_mask)
    validation.expert_ids_in_range(topk_ids, num_experts=router_logits.shape[1])

    mask_T1 = attention_mask[:, None]
    # masked before the softmax too: through a NaN, its gradient of zero would be NaN
    logits_TE = torch.where(mask_T1, at_least_float32(router_logits), 0)
    probs_TE = torch.where(mask_T1, torch.softmax(logits_TE, dim=-1), 0)
    num_experts = router_logits.shape[1]
    assignments_E = assignments(topk_ids, attention_mask, num_experts)

    num_unmasked = attention_mask.sum().clamp(min=1)
    share_E = assignments_E.to(probs_TE.dtype) / (num_unmasked * topk_ids.shape[1])
    probability_E = probs_TE.sum(dim=0) / num_unmasked
    return num_experts * (share_E * probability_E).sum()


def sequence_balance_loss(
    router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor, *, scores: ScoreFunction
) -> torch.Tensor:
    """Return the load-balancing loss of each sequence by itself, averaged: 1 where all experts have the same load.

        loss = mean over b of sum over e of load[b, e] * probability[b, e]
        load[b, e] = num_experts / (top_k * tokens of b) * assignments of expert e in sequence b; no gradient
        probability[b, e] = mean over tokens t of b of s[b, t, e] / sum of s[b, t],  s = scores(router_logits)

    Only tokens of the mask count, and sequences that have one; where there are none, the loss and its gradient are 0.
    A caller multiplies by the factor alpha of the papers.

    Args:
        router_logits: [batch_size, sequence_length, num_experts], any floating dtype; where masked, any values, NaN too.
        topk_ids: [batch_size, sequence_length, top_k], integer in 0..num_experts - 1.
        attention_mask: [batch_size, sequence_length], bool, False for padding.
        scores: "sigmoid" as in DeepSeek-V3, or "softmax" as in DeepSeek-V2 and DiT-MoE.

    Returns:
        [], float32 (float64 for float64 logits).

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or `scores` is neither of the two.

    Source: DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20; DeepSeek-V2 (arXiv:2405.04434), equations 23 to 25, whose
    sequence is the batch; feizc/DiT-MoE models.py, its loss per sample.
    """
    validation.sequence_balance_loss(router_logits, topk_ids, attention_mask, scores)
    validation.expert_ids_in_range(topk_ids, num_experts=router_logits.shape[2])

    mask_BT1 = attention_mask[..., None]
    # masked before the softmax too: through a NaN, its gradient of zero would be NaN
    logits_BTE = torch.where(mask_BT1, at_least_float32(router_logits), 0)
    probs_BTE = torch.where(mask_BT1, normalized_scores(logits_BTE, scores), 0)
    num_experts, top_k = router_logits.shape[2], topk_ids.shape[2]
    assignments_BE = assignments(topk_ids, attention_mask, num_experts)

    num_unmasked_B1 = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
    load_BE = num_experts * assignments_BE.to(probs_BTE.dtype) / (num_unmasked_B1 * top_k)
    probability_BE = probs_BTE.sum(dim=1) / num_unmasked_B1
    return (load_BE * probability_BE).sum() / attention_mask.any(dim=1).sum().clamp(min=1)


def normalized_scores(router_logits: torch.Tensor, scores: ScoreFunction) -> torch.Tensor:
    """Return each token's scores divided by their sum, [..., num_experts], dtype as router_logits."""
    # s / sum of s is the softmax of log s, which has a value also where every s underflows
    log_scores = torch.nn.functional.logsigmoid(router_logits) if scores == "sigmoid" else router_logits
    return torch.softmax(log_scores, dim=-1)


def router_z_loss(router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the z-loss of one layer, which keeps router logits small.

        loss = mean over tokens of logsumexp(router_logits) ** 2

    Only tokens of the mask count; where there are none, the loss and its gradient are 0.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype; where masked, any values, NaN too.
        attention_mask: [num_tokens], bool, False for padding.

    Returns:
        [], float32 (float64 for float64 logits).

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together.

    Source: ST-MoE (arXiv:2202.08906), equation 5.
    """
    validation.router_z_loss(router_logits, attention_mask)

    # masked before the logsumexp too: through a NaN, its gradient of zero would be NaN
    logits_TE = torch.where(attention_mask[:, None], at_least_float32(router_logits), 0)
    z_T = torch.where(attention_mask, torch.logsumexp(logits_TE, dim=-1), 0)
    return (z_T**2).sum() / attention_mask.sum().clamp(min=1)


def routing_entropy(router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return how undecided a router is, in nats: 0 where it is certain, ln(num_experts) where all experts are as probable.

        entropy = mean over tokens of -(sum over e of p[e] * ln(p[e])),  p = softmax(router_logits),  0 * ln(0) = 0

    Only tokens of the mask count; where there are none, the entropy and its gradient are 0.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype; where masked, any values, NaN too. They are those before
            any noise, or the entropy is that of the noise too.
        attention_mask: [num_tokens], bool, False for padding.

    Returns:
        [], float32 (float64 for float64 logits).

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together.

    Source: Shannon 1948, section 6. moe-emergence has ln(p + 1e-9) for ln(p): less by at most 1e-9 * num_experts, and below 0
    where a router is certain; in float16, where 1e-9 is 0, its 0 * ln(0) is NaN.
    """
    validation.routing_entropy(router_logits, attention_mask)

    # masked before the softmax too: through a NaN, its gradient of zero would be NaN
    logits_TE = torch.where(attention_mask[:, None], at_least_float32(router_logits), 0)
    log_probs_TE = torch.log_softmax(logits_TE, dim=-1)
    # a probability of 0 adds nothing: neither 0 * ln(0) nor its gradient is NaN so
    summands_TE = log_probs_TE.exp() * torch.where(log_probs_TE == -torch.inf, 0, log_probs_TE)
    entropy_T = torch.where(attention_mask, -summands_TE.sum(dim=-1), 0)
    return entropy_T.sum() / attention_mask.sum().clamp(min=1)


def expert_load(topk_ids: torch.Tensor, attention_mask: torch.Tensor, *, num_experts: int) -> torch.Tensor:
    """Return how often each expert is chosen.

        load[e] = number of (t, j) with attention_mask[t] and topk_ids[t, j] = e

    An id given twice in a row counts twice.

    Args:
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1.
        attention_mask: [num_tokens], bool, False for padding.
        num_experts: Number of experts, of whom some may have no token.

    Returns:
        [num_experts], int64.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `num_experts` is no integer.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or there are none.

    Source: DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, where it decides each step's update of the biases.
    """
    validation.expert_load(topk_ids, attention_mask, num_experts)
    validation.expert_ids_in_range(topk_ids, num_experts=num_experts)

    return assignments(topk_ids, attention_mask, num_experts)


def correction_bias_update(
    e_score_correction_bias: torch.Tensor, tokens_per_expert: torch.Tensor, *, update_rate: float
) -> torch.Tensor:
    """Return the biases of the next step: less for experts of more than the mean load, more for those of less.

        bias[e] + update_rate * sign(mean of tokens_per_expert - tokens_per_expert[e])

    Loads are compared as integers, so that a load of just the mean changes nothing, however large.

    Args:
        e_score_correction_bias: [num_experts], float32: lower precision would lose a rate of 0.001 beside a bias of 1.
        tokens_per_expert: [num_experts], integer, not negative: this step's load, of all ranks together.
        update_rate: At least 0; DeepSeek-V3 has 0.001, and 0 for its last tokens.

    Returns:
        [num_experts], float32 (float64 for float64 biases). No gradient.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `update_rate` is no number.
        ValueError: Sizes or devices do not fit together, there are no experts, or `update_rate` is negative or not finite.

    Source: Wang et al. 2024 (arXiv:2408.15664), algorithm 1; DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.
    """
    validation.correction_bias_update(e_score_correction_bias, tokens_per_expert, update_rate)

    load_E = tokens_per_expert.to(torch.int64)
    total, num_experts = load_E.sum(), load_E.shape[0]
    # what is left of the division makes the mean larger than the integer that it is rounded down to
    sign_E = torch.sign(2 * (total // num_experts - load_E) + (total % num_experts).sign())
    return e_score_correction_bias.detach() + update_rate * sign_E


def assignments(topk_ids: torch.Tensor, attention_mask: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how often the tokens that count choose each expert, [..., num_experts] for ids of [..., num_tokens, top_k]."""
    is_chosen_TKE = topk_ids[..., None] == torch.arange(num_experts, device=topk_ids.device)
    return torch.where(attention_mask[..., None], is_chosen_TKE.sum(dim=-2), 0).sum(dim=-2)
