"""Routers whose experts have room for so many tokens.

Shapes: T num_tokens, E num_experts, N choices of all tokens in the order in which they ask for room, C tokens of an expert.
"""

import math

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import SMALLEST_WEIGHT_SUM, SecondExpertPolicy
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
    place_T = places(ids_T, torch.ones_like(ids_T), num_experts)
    dropped_T = place_T > expert_capacity(num_tokens, num_experts, capacity_factor)
    weights_T = probs_TE.gather(-1, ids_T[:, None])[:, 0]
    return torch.where(dropped_T, 0, weights_T), ids_T, dropped_T


def gshard_top2(
    router_logits: torch.Tensor,
    noise: torch.Tensor | None,
    attention_mask: torch.Tensor,
    *,
    second_expert_policy: SecondExpertPolicy,
    normalize_before_dropping: bool,
    capacity_factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose two experts of each token, the second with a random draw; an expert takes as many as it has room for.

        p = softmax(router_logits)
        first = argmax(p)
        second = argmax(router_logits, plus noise if "sampling", of all but first)
        w = p[first, second]                                if not normalize_before_dropping
        w = p[first, second] / (p[first] + p[second])       if normalize_before_dropping
        asked = the first and the second, but of padding neither, and of "random" the second if 2 * w[second] > noise[second]
        dropped = not asked, or capacity others asked that expert before, all tokens their first in order, then their second
        weights = w, or 0 if dropped, divided by their sum if not normalize_before_dropping
        capacity = ceil(num_tokens * capacity_factor / num_experts)

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, two experts at least; where masked, any values, NaN too.
        noise: [num_tokens, num_experts], floating: of "sampling" Gumbel noise, of "random" numbers from [0, 1), of which
            one of each token is read. Of "all" it is not read, and may be None. It gets no gradient.
        attention_mask: [num_tokens], bool, False for padding, which takes no room.
        second_expert_policy: "all" (every token asks for its second expert), "sampling" (the second expert is drawn) or
            "random" (whether the second expert is asked is drawn).
        normalize_before_dropping: Whether the two weights sum to 1 before one is dropped, or afterwards.
        capacity_factor: Room in all experts together, in tokens per token; positive.

    Returns:
        topk_weights: [num_tokens, 2], float32 (float64 for float64 logits). A divisor is at least 2^-23.
        topk_ids: [num_tokens, 2], int64, the first and the second; of equals any. A token with a NaN logit gets any two
            ids, as does padding. A dropped expert keeps its id.
        dropped: [num_tokens, 2], bool.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `capacity_factor` is not a number.
        ValueError: Ranks, sizes or devices do not fit together, there are fewer than two experts, the policy is none of
            the three or lacks its noise, or `capacity_factor` is not positive.

    Source: GShard (arXiv:2006.16668), algorithm 1, which is "random" and normalizes before; NLLB (arXiv:2207.04672),
    as fairseq's `top2gating`. transformers' `NllbMoeTop2Router` returns p[second] as it is where both "random" and
    normalize_before_dropping are set.
    """
    validation.gshard_top2(router_logits, noise, attention_mask, second_expert_policy, capacity_factor)
    num_tokens, num_experts = router_logits.shape

    # masked before the softmax: through a NaN, its gradient of zero would be NaN
    logits_TE = torch.where(attention_mask[:, None], at_least_float32(router_logits), 0)
    probs_TE = torch.softmax(logits_TE, dim=-1)
    first_T1 = probs_TE.argmax(dim=-1, keepdim=True)
    noise_TE = logits_TE if noise is None else noise  # "all" reads neither
    scores_TE = logits_TE + noise_TE if second_expert_policy == "sampling" else logits_TE
    ids_T2 = torch.topk(scores_TE.scatter(1, first_T1, torch.inf), 2, dim=-1).indices
    weights_T2 = probs_TE.gather(1, ids_T2)
    if normalize_before_dropping:
        weights_T2 = weights_T2 / weights_T2.sum(dim=-1, keepdim=True)

    asks_T2 = attention_mask[:, None].repeat(1, 2)
    if second_expert_policy == "random":
        is_drawn_T2 = 2 * weights_T2 > noise_TE.gather(1, ids_T2)
        asks_T2[:, 1] &= is_drawn_T2[:, 1]
    place_T2 = places(ids_T2.T.flatten(), asks_T2.T.flatten(), num_experts).view(2, num_tokens).T
    dropped_T2 = ~asks_T2 | (place_T2 > expert_capacity(num_tokens, num_experts, capacity_factor))
    kept_T2 = torch.where(dropped_T2, 0, weights_T2)
    if not normalize_before_dropping:
        kept_T2 = kept_T2 / kept_T2.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_WEIGHT_SUM)
    return kept_T2, ids_T2, dropped_T2


def expert_choice(router_logits: torch.Tensor, *, capacity_factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Let each expert choose the tokens to which it is most probable, as many as it has room for.

        p = softmax(router_logits)
        ids[e] = top_capacity(p[:, e])
        weights[e] = p[ids[e], e]
        capacity = min(ceil(num_tokens * capacity_factor / num_experts), num_tokens)

    A token may be chosen by no expert, or by many. What an expert chooses depends on all tokens, later ones too.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        capacity_factor: Experts per token, on average; positive.

    Returns:
        weights: [num_experts, capacity], float32 (float64 for float64 logits).
        token_ids: [num_experts, capacity], int64, by descending probability; equal ones in any order. A token with a
            NaN logit may have any place.

    Raises:
        TypeError: `router_logits` is not a floating array, or `capacity_factor` is not a number.
        ValueError: `router_logits` is not of rank 2 or has no experts, or `capacity_factor` is not positive.

    Source: Mixture-of-Experts with Expert Choice Routing (arXiv:2202.09368), section 3.2, whose k = n * c / e is not said
    to be an integer; it is rounded up here, so that each expert has work.
    """
    validation.expert_choice(router_logits, capacity_factor)
    num_tokens, num_experts = router_logits.shape

    probs_ET = torch.softmax(at_least_float32(router_logits), dim=-1).T
    ids_EC = torch.topk(probs_ET, chosen_tokens(num_tokens, num_experts, capacity_factor), dim=-1).indices
    return probs_ET.gather(1, ids_EC), ids_EC


def places(ids_N: torch.Tensor, asks_N: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return which place each choice has among those that ask its expert for room, 1 for the first, [choices]."""
    asked_NE = torch.nn.functional.one_hot(ids_N, num_experts) * asks_N[:, None]
    return asked_NE.cumsum(dim=0).gather(1, ids_N[:, None])[:, 0]


def expert_capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """Return how many tokens an expert has room for, ceil(num_tokens * capacity_factor / num_experts).

    It is computed from left to right in float64: where the quotient is an integer but for rounding, the order counts.
    """
    return math.ceil(num_tokens * capacity_factor / num_experts)


def chosen_tokens(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """Return how many tokens an expert chooses: all that it has room for, if there are so many."""
    return min(expert_capacity(num_tokens, num_experts, capacity_factor), num_tokens)
