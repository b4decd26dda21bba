"""Losses and figures of a router's load.

Shapes: T num_tokens, E num_experts, K top_k.
"""

import torch

from gaugeblock.reference import validation
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
    is_chosen_TKE = topk_ids[..., None] == torch.arange(num_experts, device=topk_ids.device)
    assignments_E = torch.where(mask_T1, is_chosen_TKE.sum(dim=1), 0).sum(dim=0)

    num_unmasked = attention_mask.sum().clamp(min=1)
    share_E = assignments_E.to(probs_TE.dtype) / (num_unmasked * topk_ids.shape[1])
    probability_E = probs_TE.sum(dim=0) / num_unmasked
    return num_experts * (share_E * probability_E).sum()


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
