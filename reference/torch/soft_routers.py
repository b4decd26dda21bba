"""Routers that balance by softmaxes over tokens.

Shapes: B batch_size, T num_tokens, S num_slots, E num_experts, K top_k.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import ScoreFunction
from gaugeblock.reference.torch.precision import at_least_float32


def soft_moe(router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how slots are mixed from tokens, and tokens from what experts make of the slots.

        dispatch_weights = softmax of router_logits over the tokens
        combine_weights = softmax of router_logits over the slots

    A slot's input is the sum over tokens of dispatch_weights * token, a token's output the sum over slots of
    combine_weights * output of the slot. Slots of an expert follow each other.

    Args:
        router_logits: [batch_size, num_tokens, num_slots], any floating dtype; a batch is of sequences, whose tokens do not mix.

    Returns:
        dispatch_weights, combine_weights: [batch_size, num_tokens, num_slots], float32 (float64 for float64 logits).

    Raises:
        TypeError: `router_logits` is not a floating array.
        ValueError: `router_logits` is not of rank 3, or has no tokens or no slots.

    Source: From Sparse to Soft Mixtures of Experts (arXiv:2308.00951), section 2.1, equations 1 to 3.
    """
    validation.soft_moe(router_logits)

    logits_BTS = at_least_float32(router_logits)
    return torch.softmax(logits_BTS, dim=1), torch.softmax(logits_BTS, dim=2)


def sinkhorn(
    router_logits: torch.Tensor, *, top_k: int, num_iterations: int, score_function: ScoreFunction
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` experts of each token from a matrix that gives every token and every expert its share.

        balanced = exp(router_logits); num_iterations times: rows are divided by their sums, then columns by theirs
        ids = top_k(balanced)
        weights = score_function(router_logits)[ids]

    The choice has no gradient.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        top_k: Experts per token, 1 to num_experts.
        num_iterations: How often rows and columns are divided, 0 or more. It is not stopped sooner.
        score_function: "sigmoid", of each logit, or "softmax", over the experts. Megatron-LM has the former for one expert, the
            latter for more.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending share; equal ones in any order. Where a logit is NaN, all tokens get
            any distinct ids.

    Raises:
        TypeError: `router_logits` is not a floating array, or an option is of another kind.
        ValueError: `router_logits` is not of rank 2, `top_k` is not in 1..num_experts, `num_iterations` is negative, or
            `score_function` is not known.

    Source: BASE Layers (arXiv:2103.16716), section 3.1, approximated as in S-BASE (arXiv:2202.01169); Megatron-LM,
    `megatron/core/transformer/moe/moe_utils.py`, which stops when columns hardly change, and adds 1e-8 to sums.
    """
    validation.sinkhorn(router_logits, top_k, num_iterations, score_function)

    logits_TE = at_least_float32(router_logits)
    ids_TK = torch.topk(balanced_logits(logits_TE, num_iterations), top_k, dim=-1).indices
    scores_TE = torch.sigmoid(logits_TE) if score_function == "sigmoid" else torch.softmax(logits_TE, dim=-1)
    return scores_TE.gather(-1, ids_TK), ids_TK


def balanced_logits(router_logits: torch.Tensor, num_iterations: int) -> torch.Tensor:
    """Return what experts are chosen by, the logarithm of the balanced matrix, in the dtype of router_logits.

    Left out is what is added to the whole row of a token, which changes no order in it.
    """
    balanced_TE = router_logits
    for _ in range(num_iterations):
        rows_T1 = torch.logsumexp(balanced_TE, dim=1, keepdim=True)
        balanced_TE = router_logits - torch.logsumexp(router_logits - rows_T1, dim=0)
    return balanced_TE
