"""Steps that decide masked tokens: which places of a block get their token now, and which stay masks.

What is drawn is drawn by given uniform numbers. A token that is no mask is never touched, and the mask never chosen. Of equal
confidences the first place comes first.

Shapes: B batch_size, S places of a block, V vocabulary_size, K steps.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DreamAlgorithm, PlaceStrategy, Remasking, TokenConfidence
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.token_choices import draw_tokens, filter_logits, gumbel, token_confidence, without_tokens

CONFIDENCES: dict[DreamAlgorithm, TokenConfidence] = {
    "origin": "probability",
    "maskgit_plus": "probability",
    "topk_margin": "margin",
    "entropy": "negative_entropy",
}


def quotas(num_masked: torch.Tensor, *, steps: int) -> torch.Tensor:
    """Return how many masks each step decides: as many in each, and one more in the first ones.

    Args:
        num_masked: [batch_size], integer.
        steps: At least 1.

    Returns:
        [batch_size, steps], dtype as num_masked; a row's sum is its num_masked.

    Raises:
        TypeError: `num_masked` is no integer array, or `steps` no integer.
        ValueError: `num_masked` is not of rank 1, or `steps` is less than 1.

    Source: ML-GSAI/LLaDA, generate.py, get_num_transfer_tokens.
    """
    validation.quotas(num_masked, steps)
    steps_K = torch.arange(steps, dtype=num_masked.dtype, device=num_masked.device)
    return num_masked[:, None] // steps + (steps_K < num_masked[:, None] % steps).to(num_masked.dtype)


def choose_places(
    confidence: torch.Tensor, is_masked: torch.Tensor, counts: torch.Tensor, *, strategy: PlaceStrategy, bound: float
) -> torch.Tensor:
    """Choose the masks that are decided now.

        static           the `counts` most confident masks
        dynamic          all of confidence > bound if these are `counts` at least, else as static
        sequential       the first `counts` masks
        entropy_bounded  with entropies -confidence, ascending: as many as add up to less than bound, and one at least

    Where fewer than `counts` are left, all of them are chosen.

    Args:
        confidence: [batch_size, places], any floating dtype; a NaN is the least.
        is_masked: [batch_size, places], bool.
        counts: [batch_size], integer, 0 or more; of no use to entropy_bounded.
        strategy: See above.
        bound: A confidence, or an entropy; of no use to the other two.

    Returns:
        [batch_size, places], bool; of equal confidences the first place.

    Raises:
        TypeError: An array is not of the dtype above, or `bound` is not a number.
        ValueError: Shapes do not fit together, or `strategy` is unknown.

    Source: JetLM/SDAR, generate.py and JetEngine's scheduler; Ben-Hamu et al. (arXiv:2505.24857) for entropy_bounded.
    """
    validation.choose_places(confidence, is_masked, counts, strategy, bound)
    confidence_BS = at_least_float32(confidence)
    if strategy == "sequential":
        confidence_BS = -torch.arange(confidence.shape[1], device=confidence.device).expand(confidence.shape).to(torch.float32)

    # the least number, so that a mask of no confidence still comes before what is none
    least = torch.finfo(torch.float32).min
    known_BS = torch.nan_to_num(confidence_BS, nan=least, neginf=least, posinf=torch.inf)
    keys_BS = torch.where(is_masked, known_BS, -torch.inf)
    order_BS = torch.sort(keys_BS, dim=-1, descending=True, stable=True).indices
    ranks_BS = torch.argsort(order_BS, dim=-1)
    counts_B1 = counts[:, None]
    if strategy == "entropy_bounded":
        sums_BS = (-keys_BS.gather(-1, order_BS)).cumsum(dim=-1)
        counts_B1 = (sums_BS < bound).sum(dim=-1, keepdim=True).clamp(min=1)
    best_BS = is_masked & (ranks_BS < counts_B1)
    if strategy == "dynamic":
        sure_BS = is_masked & (confidence_BS > bound)
        return torch.where(sure_BS.sum(dim=-1, keepdim=True) >= counts_B1, sure_BS, best_BS)
    return best_BS


def noisy_confidence(confidence: torch.Tensor, uniforms: torch.Tensor, *, alg_temp: float) -> torch.Tensor:
    """Return confidence / alg_temp - ln(-ln(uniforms)): its highest places are a draw without replacement by the softmax.

    Args:
        confidence: [batch_size, places], float32 or float64.
        uniforms: [batch_size, places], float32 in [0, 1).
        alg_temp: Positive.

    Returns:
        Like confidence.

    Source: Kool et al. (arXiv:1903.06059), section 2.3.
    """
    return confidence / alg_temp + gumbel(uniforms.to(confidence.dtype))


def llada_step(
    logits: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    uniforms: torch.Tensor | None,
    place_uniforms: torch.Tensor | None,
    *,
    mask_id: int,
    temperature: float,
    remasking: Remasking = "low_confidence",
    forbidden_ids: tuple[int, ...] = (),
    late_ids: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decide the `counts` masks of highest confidence: the token's probability without temperature and noise, or at random.

    Args:
        logits: [batch_size, places, vocabulary_size], any floating dtype.
        ids: [batch_size, places], integer; of the open block alone.
        counts: [batch_size], integer: `quotas`.
        uniforms: [batch_size, places, vocabulary_size], float32 in [0, 1); None at temperature 0.
        place_uniforms: [batch_size, places], float32; None where remasking is not random.
        mask_id: What is decided; never chosen.
        temperature: Of the draw of tokens; 0 takes the most probable one.
        remasking: What confidence is.
        forbidden_ids: Never chosen either.
        late_ids: Tokens that count as of no confidence.

    Returns:
        ids: Like ids.
        accepted: [batch_size, places], bool: those that were decided.

    Raises:
        TypeError: An array is not of the dtype above, or an option is of another kind.
        ValueError: Shapes do not fit together, a value is out of its range, or uniforms are missing.

    Source: Nie et al. (arXiv:2502.09992), algorithm 5; ML-GSAI/LLaDA, generate.py.
    """
    validation.unmasking_step(logits, ids, mask_id, forbidden_ids, counts=counts, uniforms=uniforms)
    validation.random_remasking(ids, place_uniforms, remasking)
    allowed = without_tokens(logits, (mask_id, *forbidden_ids))
    tokens_BS, confidence_BS = drawn(allowed, uniforms, temperature=temperature, confidence="probability")
    if remasking == "random" and place_uniforms is not None:
        confidence_BS = place_uniforms
    for late_id in late_ids:
        confidence_BS = confidence_BS.masked_fill(tokens_BS == late_id, -torch.inf)
    accepted_BS = choose_places(confidence_BS, ids == mask_id, counts, strategy="static", bound=0.0)
    return torch.where(accepted_BS, tokens_BS.to(ids.dtype), ids), accepted_BS


def sdar_step(
    logits: torch.Tensor,
    ids: torch.Tensor,
    counts: torch.Tensor,
    uniforms: torch.Tensor | None,
    *,
    mask_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
    strategy: PlaceStrategy,
    bound: float,
    forbidden_ids: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decide masks of a block by how sure the draw is: confidence is the probability after temperature, top_k and top_p.

    At temperature 0 the most probable token is taken, and confidence is its probability among all. Entropies are those of all
    tokens, without temperature.

    Args: as of `llada_step`, and
        top_k, top_p: As of `filter_logits`; of no use at temperature 0.
        strategy, bound: As of `choose_places`.

    Returns: as `llada_step`.

    Raises: as `llada_step`.

    Source: JetLM/SDAR, generate.py, and JetEngine's scheduler for entropy_bounded.
    """
    validation.unmasking_step(logits, ids, mask_id, forbidden_ids, counts=counts, uniforms=uniforms)
    allowed = without_tokens(logits, (mask_id, *forbidden_ids))
    draw_from, draw_temperature = allowed, 0.0
    if temperature > 0:
        draw_from, draw_temperature = filtered(allowed, temperature, top_k, top_p, top_k_first=True), 1.0
    tokens_BS, confidence_BS = drawn(draw_from, uniforms, temperature=draw_temperature, confidence="probability")
    if strategy == "entropy_bounded":
        confidence_BS = token_confidence(as_rows(allowed), tokens_BS.flatten(), confidence="negative_entropy")
        confidence_BS = confidence_BS.reshape(ids.shape)
    accepted_BS = choose_places(confidence_BS, ids == mask_id, counts, strategy=strategy, bound=bound)
    return torch.where(accepted_BS, tokens_BS.to(ids.dtype), ids), accepted_BS


def dream_step(
    logits: torch.Tensor,
    ids: torch.Tensor,
    uniforms: torch.Tensor | None,
    place_uniforms: torch.Tensor | None,
    *,
    mask_id: int,
    rate: float,
    temperature: float,
    top_k: int,
    top_p: float,
    algorithm: DreamAlgorithm,
    alg_temp: float,
    forbidden_ids: tuple[int, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decide a share of a row's masks: each by itself (origin), or the floor(masks * rate) of highest confidence.

        maskgit_plus  the token's probability
        topk_margin   the highest probability less the second
        entropy       the negative entropy

    all after temperature, top_p and top_k; with alg_temp, places are drawn by softmax(confidence / alg_temp).

    Args: as of `llada_step`, and
        logits: Those that predict their own place: a model that predicts the next one has them shifted.
        place_uniforms: [batch_size, places], float32 in [0, 1); for origin and a positive alg_temp.
        rate: 1 - s / t from time t to s, in [0, 1]; 1 in the last step.
        top_k, top_p: As of `filter_logits`.
        algorithm: What confidence is.
        alg_temp: 0 or more.

    Returns: as `llada_step`.

    Raises: as `llada_step`.

    Source: Ye et al. (arXiv:2508.15487); the public model's generation_utils.py, whose count is of the whole batch.
    """
    validation.unmasking_step(logits, ids, mask_id, forbidden_ids, uniforms=uniforms)
    validation.dream_places(ids, place_uniforms, rate, algorithm, alg_temp)
    is_masked_BS = ids == mask_id
    allowed = without_tokens(logits, (mask_id, *forbidden_ids))
    draw_from = filtered(allowed, temperature or 1.0, top_k, top_p, top_k_first=False)
    tokens_BS, confidence_BS = drawn(
        draw_from, uniforms, temperature=1.0 if temperature > 0 else 0.0, confidence=CONFIDENCES[algorithm]
    )
    if algorithm == "origin":
        assert place_uniforms is not None
        accepted_BS = is_masked_BS & (place_uniforms < rate)
    else:
        if place_uniforms is not None and alg_temp > 0:
            confidence_BS = noisy_confidence(confidence_BS, place_uniforms, alg_temp=alg_temp)
        counts_B = (is_masked_BS.sum(dim=-1).to(torch.float32) * rate).to(torch.int64)
        accepted_BS = choose_places(confidence_BS, is_masked_BS, counts_B, strategy="static", bound=0.0)
    return torch.where(accepted_BS, tokens_BS.to(ids.dtype), ids), accepted_BS


def filtered(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, *, top_k_first: bool) -> torch.Tensor:
    """Return `filter_logits` of logits [batch_size, places, vocabulary_size], in that shape."""
    kept, _ = filter_logits(as_rows(logits), temperature=temperature, top_k=top_k, top_p=top_p, top_k_first=top_k_first)
    return kept.reshape(logits.shape)


def drawn(
    logits: torch.Tensor, uniforms: torch.Tensor | None, *, temperature: float, confidence: TokenConfidence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `draw_tokens` of logits [batch_size, places, vocabulary_size], both [batch_size, places]."""
    rows = None if uniforms is None else as_rows(uniforms)
    tokens, confidences = draw_tokens(as_rows(logits), rows, temperature=temperature, confidence=confidence)
    return tokens.reshape(logits.shape[:2]), confidences.reshape(logits.shape[:2])


def as_rows(array: torch.Tensor) -> torch.Tensor:
    """Return [batch_size, places, vocabulary_size] as [batch_size * places, vocabulary_size]."""
    return array.flatten(0, 1)
