"""Steps that decide masked tokens: which places of a block get their token now, and which stay masks.

What is drawn is drawn by given uniform numbers. A token that is no mask is never touched, and the mask never chosen. Of equal
confidences the first place comes first.

Shapes: B batch_size, S places of a block, V vocabulary_size, K steps.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DreamAlgorithm, PlaceStrategy, Remasking, TokenConfidence
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.token_choices import draw_tokens, filter_logits, gumbel, token_confidence, without_tokens

CONFIDENCES: dict[DreamAlgorithm, TokenConfidence] = {
    "origin": "probability",
    "maskgit_plus": "probability",
    "topk_margin": "margin",
    "entropy": "negative_entropy",
}


def quotas(num_masked: jax.Array, *, steps: int) -> jax.Array:
    """As `gaugeblock.reference.torch.unmasking.quotas`."""
    validation.quotas(num_masked, steps)
    steps_K = jnp.arange(steps, dtype=num_masked.dtype)
    return num_masked[:, None] // steps + (steps_K < num_masked[:, None] % steps).astype(num_masked.dtype)


def choose_places(
    confidence: jax.Array, is_masked: jax.Array, counts: jax.Array, *, strategy: PlaceStrategy, bound: float
) -> jax.Array:
    """As `gaugeblock.reference.torch.unmasking.choose_places`."""
    validation.choose_places(confidence, is_masked, counts, strategy, bound)
    confidence_BS = at_least_float32(confidence)
    if strategy == "sequential":
        confidence_BS = jnp.broadcast_to(-jnp.arange(confidence.shape[1]), confidence.shape).astype(jnp.float32)

    # the least number, so that a mask of no confidence still comes before what is none
    least = jnp.finfo(jnp.float32).min
    known_BS = jnp.nan_to_num(confidence_BS, nan=least, neginf=least, posinf=jnp.inf)
    keys_BS = jnp.where(is_masked, known_BS, -jnp.inf)
    order_BS = jnp.argsort(keys_BS, axis=-1, descending=True, stable=True)
    ranks_BS = jnp.argsort(order_BS, axis=-1)
    counts_B1 = counts[:, None]
    if strategy == "entropy_bounded":
        sums_BS = jnp.cumsum(-jnp.take_along_axis(keys_BS, order_BS, axis=-1), axis=-1)
        counts_B1 = jnp.maximum((sums_BS < bound).sum(axis=-1, keepdims=True), 1)
    best_BS = is_masked & (ranks_BS < counts_B1)
    if strategy == "dynamic":
        sure_BS = is_masked & (confidence_BS > bound)
        return jnp.where(sure_BS.sum(axis=-1, keepdims=True) >= counts_B1, sure_BS, best_BS)
    return best_BS


def noisy_confidence(confidence: jax.Array, uniforms: jax.Array, *, alg_temp: float) -> jax.Array:
    """As `gaugeblock.reference.torch.unmasking.noisy_confidence`."""
    return confidence / alg_temp + gumbel(uniforms.astype(confidence.dtype))


def llada_step(
    logits: jax.Array,
    ids: jax.Array,
    counts: jax.Array,
    uniforms: jax.Array | None,
    place_uniforms: jax.Array | None,
    *,
    mask_id: int,
    temperature: float,
    remasking: Remasking = "low_confidence",
    forbidden_ids: tuple[int, ...] = (),
    late_ids: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.unmasking.llada_step`."""
    validation.unmasking_step(logits, ids, mask_id, forbidden_ids, counts=counts, uniforms=uniforms)
    validation.random_remasking(ids, place_uniforms, remasking)
    allowed = without_tokens(logits, (mask_id, *forbidden_ids))
    tokens_BS, confidence_BS = drawn(allowed, uniforms, temperature=temperature, confidence="probability")
    if remasking == "random" and place_uniforms is not None:
        confidence_BS = place_uniforms
    for late_id in late_ids:
        confidence_BS = jnp.where(tokens_BS == late_id, -jnp.inf, confidence_BS)
    accepted_BS = choose_places(confidence_BS, ids == mask_id, counts, strategy="static", bound=0.0)
    return jnp.where(accepted_BS, tokens_BS.astype(ids.dtype), ids), accepted_BS


def sdar_step(
    logits: jax.Array,
    ids: jax.Array,
    counts: jax.Array,
    uniforms: jax.Array | None,
    *,
    mask_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
    strategy: PlaceStrategy,
    bound: float,
    forbidden_ids: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.unmasking.sdar_step`."""
    validation.unmasking_step(logits, ids, mask_id, forbidden_ids, counts=counts, uniforms=uniforms)
    allowed = without_tokens(logits, (mask_id, *forbidden_ids))
    draw_from, draw_temperature = allowed, 0.0
    if temperature > 0:
        draw_from, draw_temperature = filtered(allowed, temperature, top_k, top_p, top_k_first=True), 1.0
    tokens_BS, confidence_BS = drawn(draw_from, uniforms, temperature=draw_temperature, confidence="probability")
    if strategy == "entropy_bounded":
        confidence_BS = token_confidence(as_rows(allowed), tokens_BS.reshape(tokens_BS.size), confidence="negative_entropy")
        confidence_BS = confidence_BS.reshape(ids.shape)
    accepted_BS = choose_places(confidence_BS, ids == mask_id, counts, strategy=strategy, bound=bound)
    return jnp.where(accepted_BS, tokens_BS.astype(ids.dtype), ids), accepted_BS


def dream_step(
    logits: jax.Array,
    ids: jax.Array,
    uniforms: jax.Array | None,
    place_uniforms: jax.Array | None,
    *,
    mask_id: int,
    rate: float,
    temperature: float,
    top_k: int,
    top_p: float,
    algorithm: DreamAlgorithm,
    alg_temp: float,
    forbidden_ids: tuple[int, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.unmasking.dream_step`."""
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
        counts_B = (is_masked_BS.sum(axis=-1).astype(jnp.float32) * rate).astype(jnp.int32)
        accepted_BS = choose_places(confidence_BS, is_masked_BS, counts_B, strategy="static", bound=0.0)
    return jnp.where(accepted_BS, tokens_BS.astype(ids.dtype), ids), accepted_BS


def filtered(logits: jax.Array, temperature: float, top_k: int, top_p: float, *, top_k_first: bool) -> jax.Array:
    """Return `filter_logits` of logits [batch_size, places, vocabulary_size], in that shape."""
    kept, _ = filter_logits(as_rows(logits), temperature=temperature, top_k=top_k, top_p=top_p, top_k_first=top_k_first)
    return kept.reshape(logits.shape)


def drawn(
    logits: jax.Array, uniforms: jax.Array | None, *, temperature: float, confidence: TokenConfidence
) -> tuple[jax.Array, jax.Array]:
    """Return `draw_tokens` of logits [batch_size, places, vocabulary_size], both [batch_size, places]."""
    rows = None if uniforms is None else as_rows(uniforms)
    tokens, confidences = draw_tokens(as_rows(logits), rows, temperature=temperature, confidence=confidence)
    return tokens.reshape(logits.shape[:2]), confidences.reshape(logits.shape[:2])


def as_rows(array: jax.Array) -> jax.Array:
    """Return [batch_size, places, vocabulary_size] as [batch_size * places, vocabulary_size]."""
    return array.reshape(array.shape[0] * array.shape[1], array.shape[2])
