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


def topk_softmax(router_logits: torch.Tensor, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token's `top_k` highest logits, weighted by the softmax of those.

        ids = top_k(router_logits)
        weights = softmax(router_logits[ids])

    In exact arithmetic it is `softmax_topk`, renormalized. The router's bias is in the logits.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        top_k: Experts per token, 1 to num_experts.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending logit; equal ones in any order. A token with a NaN
            logit gets any distinct ids.

    Raises:
        TypeError: `router_logits` is not a floating array, or `top_k` not an integer.
        ValueError: `router_logits` is not of rank 2, or `top_k` is not in 1..num_experts.

    Source: the public models gpt-oss (`GptOssTopKRouter` of transformers) and Granite MoE, which take the softmax
    in the logits' dtype.
    """
    validation.topk_softmax(router_logits, top_k)

    logits_TE = at_least_float32(router_logits)
    ids_TK = torch.topk(logits_TE, top_k, dim=-1).indices
    return torch.softmax(logits_TE.gather(-1, ids_TK), dim=-1), ids_TK


def sigmoid_topk(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token's `top_k` highest sigmoids.

        s = sigmoid(router_logits)
        ids = top_k(s)
        weights = s[ids]                          if not renormalize
        weights = s[ids] / (sum(s[ids]) + 1e-20)  if renormalize

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        top_k: Experts per token, 1 to num_experts.
        renormalize: Whether the weights of a token sum to 1.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending sigmoid; equal ones, such as all that round to 1, in any
            order. A token with a NaN logit gets any distinct ids.

    Raises:
        TypeError: `router_logits` is not a floating array, or `top_k` not an integer.
        ValueError: `router_logits` is not of rank 2, or `top_k` is not in 1..num_experts.

    Source: DeepSeek-V3 Technical Report (arXiv:2412.19437), equations 13 to 15, without its bias; the 1e-20 is of
    the public model's `MoEGate`.
    """
    validation.sigmoid_topk(router_logits, top_k)

    scores_TE = torch.sigmoid(at_least_float32(router_logits))
    ids_TK = torch.topk(scores_TE, top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    return (divided_by_sum(weights_TK) if renormalize else weights_TK), ids_TK


def sigmoid_input_scaling(router_logits: torch.Tensor, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token's `top_k` highest logits, weighted by the sigmoid of those.

        ids = top_k(router_logits)
        weights = sigmoid(router_logits[ids])

    A weight multiplies what its expert reads, not what it writes: experts are not linear.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        top_k: Experts per token, 1 to num_experts.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending logit; equal ones in any order. A token with a NaN
            logit gets any distinct ids.

    Raises:
        TypeError: `router_logits` is not a floating array, or `top_k` not an integer.
        ValueError: `router_logits` is not of rank 2, or `top_k` is not in 1..num_experts.

    Source: the public model Llama 4 (`Llama4Router` of transformers).
    """
    validation.sigmoid_input_scaling(router_logits, top_k)

    logits_TE = at_least_float32(router_logits)
    ids_TK = torch.topk(logits_TE, top_k, dim=-1).indices
    return torch.sigmoid(logits_TE.gather(-1, ids_TK)), ids_TK


def grouped_softmax_topk(
    router_logits: torch.Tensor, *, top_k: int, num_groups: int, topk_groups: int, routed_scaling_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` most probable experts of each token's best `topk_groups` groups.

        p = softmax(router_logits)
        kept = top_k_groups(highest p of each group)
        ids = top_k(p, or -inf where not kept)
        weights = p[ids] * routed_scaling_factor

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        top_k: Experts per token, 1 to topk_groups * num_experts / num_groups.
        num_groups: Groups of consecutive experts; divides num_experts.
        topk_groups: Groups a token may choose from, 1 to num_groups.
        routed_scaling_factor: Multiplies every weight.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending probability; equal ones in any order. A token with a NaN
            logit gets any distinct ids.

    Raises:
        TypeError: `router_logits` is not a floating array, or an option is of another kind.
        ValueError: `router_logits` is not of rank 2, `num_groups` does not divide num_experts, `topk_groups` or
            `top_k` is more than there is to choose from, or `routed_scaling_factor` is not finite.

    Source: DeepSeek-V2 (arXiv:2405.04434), section 2.1.2. The public model gives experts of other groups the
    probability 0, not -inf: where all that are kept underflow to 0 as well, it may choose those.
    """
    validation.grouped_softmax_topk(router_logits, top_k, num_groups, topk_groups, routed_scaling_factor)

    probs_TE = torch.softmax(at_least_float32(router_logits), dim=-1)
    kept_TE = is_in_best_groups(best_of_groups(probs_TE, num_groups, 1), topk_groups, probs_TE.shape[1])
    ids_TK = torch.topk(probs_TE.masked_fill(~kept_TE, -torch.inf), top_k, dim=-1).indices
    return probs_TE.gather(-1, ids_TK) * routed_scaling_factor, ids_TK


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
    kept_TE = is_in_best_groups(best_of_groups(choice_scores_TE, num_groups, 2), topk_groups, router_logits.shape[1])
    ids_TK = torch.topk(choice_scores_TE.masked_fill(~kept_TE, -torch.inf), top_k, dim=-1).indices

    weights_TK = torch.sigmoid(at_least_float32(router_logits)).gather(-1, ids_TK)
    if renormalize:
        weights_TK = divided_by_sum(weights_TK)
    return weights_TK * routed_scaling_factor, ids_TK


def biased_softmax_topk(
    router_logits: torch.Tensor, e_score_correction_bias: torch.Tensor, *, top_k: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` most probable experts of each token, balanced by a bias.

        p = softmax(router_logits)
        ids = top_k(p + e_score_correction_bias)
        weights = p[ids] / max(sum(p[ids]), norm_min)

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        e_score_correction_bias: [num_experts], floating, usually float32. It gets no gradient.
        top_k: Experts per token, 1 to num_experts.
        norm_min: The least that weights are divided by; positive.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits).
        topk_ids: [num_tokens, top_k], int64, by descending p + bias; equal ones in any order. A token with a NaN
            logit gets any distinct ids.

    Raises:
        TypeError: An array is not a floating one, `top_k` not an integer, or `norm_min` not a number.
        ValueError: A rank, size or device is wrong, `top_k` is not in 1..num_experts, or `norm_min` is not positive.

    Source: the public model Ernie 4.5 (`Ernie4_5_MoeTopKRouter` of transformers).
    """
    validation.biased_softmax_topk(router_logits, e_score_correction_bias, top_k, norm_min)

    probs_TE = torch.softmax(at_least_float32(router_logits), dim=-1)
    ids_TK = torch.topk(probs_TE + at_least_float32(e_score_correction_bias), top_k, dim=-1).indices
    weights_TK = probs_TE.gather(-1, ids_TK)
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=norm_min), ids_TK


def zero_expert_topk(
    router_logits: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    *,
    top_k: int,
    num_zero_experts: int,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose among experts and identities, which give a token back as it is; they have no weights to multiply with.

        p = softmax(router_logits)
        ids = top_k(p + e_score_correction_bias)
        weights = p[ids] * routed_scaling_factor
        identity_weights = sum of the weights whose ids are >= num_experts - num_zero_experts

    A layer adds identity_weights * hidden_states to what the other experts give.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype; the identities are the last num_zero_experts.
        e_score_correction_bias: [num_experts], floating, usually float32. It gets no gradient.
        top_k: Experts per token, identities among them, 1 to num_experts.
        num_zero_experts: How many are identities, 0 to num_experts.
        routed_scaling_factor: Multiplies every weight.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits); those of identities too.
        topk_ids: [num_tokens, top_k], int64, by descending p + bias; equal ones in any order. A token with a NaN
            logit gets any distinct ids.
        identity_weights: [num_tokens], dtype as topk_weights.

    Raises:
        TypeError: An array is not a floating one, or an option is of another kind.
        ValueError: A rank, size or device is wrong, `top_k` is not in 1..num_experts, `num_zero_experts` is not in
            0..num_experts, or `routed_scaling_factor` is not finite.

    Source: LongCat-Flash Technical Report (arXiv:2509.01322), section 2.1; the public model's `LongcatFlashTopkRouter`.
    """
    validation.zero_expert_topk(router_logits, e_score_correction_bias, top_k, num_zero_experts, routed_scaling_factor)

    probs_TE = torch.softmax(at_least_float32(router_logits), dim=-1)
    ids_TK = torch.topk(probs_TE + at_least_float32(e_score_correction_bias), top_k, dim=-1).indices
    weights_TK = probs_TE.gather(-1, ids_TK) * routed_scaling_factor
    is_identity_TK = ids_TK >= router_logits.shape[1] - num_zero_experts
    return weights_TK, ids_TK, torch.where(is_identity_TK, weights_TK, 0).sum(dim=-1)


def sparsemixer(router_logits: torch.Tensor, *, jitter_eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose two experts of each token, one after the other, each weighted among those whose logits are near its own.

        id = argmax(x), x being the logits, without the expert chosen before
        far = (x[id] - x) / max(|x|, x[id]) > 2 * jitter_eps, which 0 / 0 is not
        weight = softmax(x, or -inf where far)[id]

    It is SparseMixer without its draws, as at inference.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype.
        jitter_eps: Half of how far, relatively, a logit may lie below the chosen one to share in its softmax; positive.

    Returns:
        topk_weights: [num_tokens, 2], float32 (float64 for float64 logits). They do not sum to 1.
        topk_ids: [num_tokens, 2], int64, by descending logit; equal ones in any order. A token with a NaN logit gets
            any distinct ids.

    Raises:
        TypeError: `router_logits` is not a floating array, or `jitter_eps` is not a number.
        ValueError: `router_logits` is not of rank 2 or has less than two experts, or `jitter_eps` is not positive.

    Source: GRIN (arXiv:2409.12136), section 3; the public model Phi-3.5-MoE (`sparsemixer` of transformers).
    """
    validation.sparsemixer(router_logits, jitter_eps)

    logits_TE = at_least_float32(router_logits)
    ids_TK = torch.topk(logits_TE, 2, dim=-1).indices
    others_TE, weights_TK = logits_TE, []
    for id_T1 in ids_TK.split(1, dim=-1):
        highest_T1 = logits_TE.gather(-1, id_T1)
        is_far_TE = (highest_T1 - logits_TE) / torch.maximum(logits_TE.abs(), highest_T1) > 2 * jitter_eps
        probs_TE = torch.softmax(others_TE.masked_fill(is_far_TE, -torch.inf), dim=-1)
        weights_TK.append(probs_TE.gather(-1, id_T1))
        others_TE = others_TE.scatter(-1, id_T1, -torch.inf)
    return torch.cat(weights_TK, dim=-1), ids_TK


def hash_router(token_ids: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose by what a token is, not by what it means: each word of the vocabulary has its expert.

        id = table[token_id]
        weight = 1

    Args:
        token_ids: [num_tokens], integer in 0..vocabulary_size - 1.
        table: [vocabulary_size], integer, the expert of each word: random, or balanced by how often words occur.

    Returns:
        weights: [num_tokens], float32.
        expert_ids: [num_tokens], int64.

    Raises:
        TypeError: An argument is not an integer array.
        ValueError: A rank or device is wrong, or a token id is outside the table.

    Source: Hash Layers (arXiv:2106.04426), section 3.
    """
    validation.hash_router(token_ids, table)
    validation.token_ids_in_range(token_ids, vocabulary_size=table.shape[0])

    # an index of narrower integers is a mask, or an error
    ids_T = table[token_ids.to(torch.int64)].to(torch.int64)
    return torch.ones(ids_T.shape, dtype=torch.float32, device=ids_T.device), ids_T


def sigmoid_choice_scores(router_logits: torch.Tensor, e_score_correction_bias: torch.Tensor) -> torch.Tensor:
    """Return what experts are chosen by, c = sigmoid(router_logits) + bias, [num_tokens, num_experts]."""
    return torch.sigmoid(at_least_float32(router_logits)) + at_least_float32(e_score_correction_bias)


def best_of_groups(choice_scores: torch.Tensor, num_groups: int, best: int) -> torch.Tensor:
    """Return the sum of the `best` highest scores of each group (of all, if it has fewer), [num_tokens, num_groups]."""
    scores_TGM = choice_scores.unflatten(-1, (num_groups, choice_scores.shape[1] // num_groups))
    return torch.topk(scores_TGM, min(best, scores_TGM.shape[-1]), dim=-1).values.sum(dim=-1)


def is_in_best_groups(group_scores: torch.Tensor, topk_groups: int, num_experts: int) -> torch.Tensor:
    """Return which experts lie in the groups of highest score, [num_tokens, num_experts], bool."""
    num_groups = group_scores.shape[1]
    best_groups = torch.topk(group_scores, topk_groups, dim=-1).indices
    kept_TG = torch.nn.functional.one_hot(best_groups, num_groups).any(dim=1)
    return kept_TG.repeat_interleave(num_experts // num_groups, dim=1)


def divided_by_sum(scores: torch.Tensor) -> torch.Tensor:
    """Return the scores of each token divided by their sum, and by 1e-20 where that is 0, [num_tokens, top_k]."""
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
