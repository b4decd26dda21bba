"""Which tokens a language model's logits choose, and how sure it is of them.

What is drawn is drawn by given uniform numbers. Of equal logits the token of the lowest id comes first.

Shapes: N num_rows, V vocabulary_size.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import TokenConfidence
from gaugeblock.reference.jax.precision import at_least_float32


def filter_logits(
    logits: jax.Array, *, temperature: float, top_k: int, top_p: float, top_k_first: bool
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.token_choices.filter_logits`."""
    validation.filter_logits(logits, temperature, top_k, top_p, top_k_first)

    before_NV = probability_before(logits, temperature=temperature, top_k=top_k, top_p=top_p, top_k_first=top_k_first)
    kept_NV = before_NV <= top_p
    return jnp.where(kept_NV, at_least_float32(logits) / temperature, -jnp.inf), kept_NV


def probability_before(logits: jax.Array, *, temperature: float, top_k: int, top_p: float, top_k_first: bool) -> jax.Array:
    """Return by what `filter_logits` keeps tokens, `before`: 0 of all in the top_k if top_p is 1, infinity outside of them."""
    logits_NV = at_least_float32(logits)
    ids_NV = jnp.argsort(logits_NV, axis=-1, descending=True, stable=True)
    last_N1 = jnp.take_along_axis(logits_NV, ids_NV[:, (top_k or logits_NV.shape[1]) - 1, None], axis=-1)
    in_top_k_NV = logits_NV >= last_N1
    before_NV = jnp.zeros_like(logits_NV)
    if top_p < 1:
        tempered_NV = logits_NV / temperature
        probs_NV = jax.nn.softmax(jnp.where(in_top_k_NV, tempered_NV, -jnp.inf) if top_k_first else tempered_NV, axis=-1)
        sums_NV = jnp.cumsum(jnp.take_along_axis(probs_NV, ids_NV, axis=-1), axis=-1)
        before_NV = jnp.put_along_axis(before_NV, ids_NV, jnp.pad(sums_NV[:, :-1], ((0, 0), (1, 0))), axis=-1, inplace=False)
    return jnp.where(in_top_k_NV, before_NV, jnp.inf)


def draw_tokens(
    logits: jax.Array, uniforms: jax.Array | None, *, temperature: float, confidence: TokenConfidence
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.token_choices.draw_tokens`, but token_ids are int32."""
    validation.draw_tokens(logits, uniforms, temperature, confidence)

    scores_NV = at_least_float32(logits)
    if uniforms is not None and temperature > 0:
        scores_NV = scores_NV / temperature + gumbel(uniforms.astype(scores_NV.dtype))
    ids_N = jnp.argmax(scores_NV, axis=-1)
    return ids_N, token_confidence(logits, ids_N, confidence=confidence)


def token_confidence(logits: jax.Array, token_ids: jax.Array, *, confidence: TokenConfidence) -> jax.Array:
    """As `gaugeblock.reference.torch.token_choices.token_confidence`."""
    probs_NV = jax.nn.softmax(at_least_float32(logits), axis=-1)
    match confidence:
        case "probability":
            return jnp.take_along_axis(probs_NV, token_ids[:, None], axis=-1)[:, 0]
        case "margin":
            best_N2, _ = jax.lax.top_k(probs_NV, 2)
            return best_N2[:, 0] - best_N2[:, 1]
        case "negative_entropy":
            return jax.scipy.special.xlogy(probs_NV, probs_NV).sum(axis=-1)


def gumbel(uniforms: jax.Array) -> jax.Array:
    """Return standard Gumbel numbers, -ln(-ln(uniforms)), in the dtype of uniforms; -inf of 0."""
    return -jnp.log(-jnp.log(uniforms))


def without_tokens(logits: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Return logits, [..., vocabulary_size], in which these tokens have -inf."""
    allowed = logits
    for token_id in ids:
        allowed = allowed.at[..., token_id].set(-jnp.inf)
    return allowed


def guided_logits(logits: jax.Array, unconditional: jax.Array, *, cfg_scale: float) -> jax.Array:
    """Return unconditional + (cfg_scale + 1) * (logits - unconditional), in at least float32, of any equal shapes."""
    u = at_least_float32(unconditional)
    return u + (cfg_scale + 1) * (at_least_float32(logits) - u)
