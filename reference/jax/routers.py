"""Routers: which experts a token goes to, and with what weights.

Shapes: T num_tokens, E num_experts, K top_k, G num_groups, M experts in one group.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32

# x / y with another derivative: JAX's own has y**-2, which is infinite for y = 1e-20
_quotient = jax.custom_jvp(jnp.divide)
_quotient.defjvps(lambda dx, quotient, x, y: dx / y, lambda dy, quotient, x, y: -dy * quotient / y)


def softmax_topk(router_logits: jax.Array, *, top_k: int, renormalize: bool) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.softmax_topk`, but topk_ids are int32."""
    validation.softmax_topk(router_logits, top_k)

    probs_TE = jax.nn.softmax(at_least_float32(router_logits), axis=-1)
    ids_TK = jax.lax.top_k(probs_TE, top_k)[1]
    weights_TK = jnp.take_along_axis(probs_TE, ids_TK, axis=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(axis=-1, keepdims=True)
    return weights_TK, ids_TK


def grouped_sigmoid_topk(
    router_logits: jax.Array,
    e_score_correction_bias: jax.Array,
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.grouped_sigmoid_topk`, but topk_ids are int32, and the bias gets a zero gradient."""
    validation.grouped_sigmoid_topk(router_logits, e_score_correction_bias, top_k, num_groups, topk_groups, routed_scaling_factor)

    choice_scores_TE = sigmoid_choice_scores(router_logits, e_score_correction_bias)
    best_groups = jax.lax.top_k(group_scores(choice_scores_TE, num_groups), topk_groups)[1]
    kept_TG = jax.nn.one_hot(best_groups, num_groups, dtype=bool).any(axis=1)
    kept_TE = kept_TG.repeat(choice_scores_TE.shape[1] // num_groups, axis=1)
    ids_TK = jax.lax.top_k(jnp.where(kept_TE, choice_scores_TE, -jnp.inf), top_k)[1]

    scores_TE = jax.nn.sigmoid(at_least_float32(router_logits))
    weights_TK = jnp.take_along_axis(scores_TE, ids_TK, axis=-1)
    if renormalize:
        weights_TK = _quotient(weights_TK, weights_TK.sum(axis=-1, keepdims=True) + 1e-20)
    return weights_TK * routed_scaling_factor, ids_TK


def sigmoid_choice_scores(router_logits: jax.Array, e_score_correction_bias: jax.Array) -> jax.Array:
    """Return what experts are chosen by, c = sigmoid(router_logits) + bias, [num_tokens, num_experts]."""
    return jax.nn.sigmoid(at_least_float32(router_logits)) + at_least_float32(e_score_correction_bias)


def group_scores(choice_scores: jax.Array, num_groups: int) -> jax.Array:
    """Return the sum of the two highest scores of each group (of its only one), [num_tokens, num_groups]."""
    num_tokens, num_experts = choice_scores.shape
    scores_TGM = choice_scores.reshape(num_tokens, num_groups, num_experts // num_groups)
    return jax.lax.top_k(scores_TGM, min(2, scores_TGM.shape[-1]))[0].sum(axis=-1)
