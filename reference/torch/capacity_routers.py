"""Routers whose experts have room for so many tokens.

Shapes: T num_tokens, E num_experts.
"""

import math

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.precision import at_least_float32


def switch_top1(router_logits: torch.Tensor, *, capacity_factor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the most probable expert of each token; an expert takes its first tokens, as many as it has room for.

        p = softmax(router_logits)
        id = argmax(p)
        dropped = capacity tokens before this one have chosen id as well
        weight = p[id], or 0 if dropped
        capacity = ceil(num_tokens * capacity_factor / num_experts)

    The jitter of Switch Transformers is not here: it multiplies what the layer that makes these logits reads.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        capacity_factor: Room in all experts together, in tokens per token; positive.

    Returns:
        weights: [num_tokens], float32 (float64 for float64 logits).
        expert_ids: [num_tokens], int64; of equal probabilities any. A token with a NaN logit gets any id. A
            dropped token keeps its id.
        dropped: [num_tokens], bool.

    Raises:
        TypeError: `router_logits` is not a floating array, or `capacity_factor` is not a number.
        ValueError: `router_logits` is not of rank 2 or has no experts, or `capacity_factor` is not positive.

    Source: Switch Transformers (arXiv:2101.03961), section 2.2, equation 3, and figure 3.
    """
    validation.switch_top1(router_logits, capacity_factor)
    num_tokens, num_experts = router_logits.shape

    probs_TE = torch.softmax(at_least_float32(router_logits), dim=-1)
    ids_T = probs_TE.argmax(dim=-1)
    has_chosen_TE = torch.nn.functional.one_hot(ids_T, num_experts)
    place_T = has_chosen_TE.cumsum(dim=0).gather(-1, ids_T[:, None])[:, 0]  # 1 for the first token of an expert
    dropped_T = place_T > expert_capacity(num_tokens, num_experts, capacity_factor)
    weights_T = probs_TE.gather(-1, ids_T[:, None])[:, 0]
    return torch.where(dropped_T, 0, weights_T), ids_T, dropped_T


def expert_capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """Return how many tokens an expert has room for, ceil(num_tokens * capacity_factor / num_experts).

    It is computed from left to right in float64: where the quotient is an integer but for rounding, the order counts.
    """
    return math.ceil(num_tokens * capacity_factor / num_experts)
