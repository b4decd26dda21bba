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


def topk_softmax(router_logits: jax.Array, *, top_k: int) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.topk_softmax`, but topk_ids are int32."""
    validation.topk_softmax(router_logits, top_k)

    logits_TE = at_least_float32(router_logits)
    ids_TK = jax.lax.top_k(logits_TE, top_k)[1]
    return jax.nn.softmax(jnp.take_along_axis(logits_TE, ids_TK, axis=-1), axis=-1), ids_TK


def sigmoid_topk(router_logits: jax.Array, *, top_k: int, renormalize: bool) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.sigmoid_topk`, but topk_ids are int32."""
    validation.sigmoid_topk(router_logits, top_k)

    scores_TE = jax.nn.sigmoid(at_least_float32(router_logits))
    ids_TK = jax.lax.top_k(scores_TE, top_k)[1]
    weights_TK = jnp.take_along_axis(scores_TE, ids_TK, axis=-1)
    return (divided_by_sum(weights_TK) if renormalize else weights_TK), ids_TK


def sigmoid_input_scaling(router_logits: jax.Array, *, top_k: int) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.sigmoid_input_scaling`, but topk_ids are int32."""
    validation.sigmoid_input_scaling(router_logits, top_k)

    logits_TE = at_least_float32(router_logits)
    ids_TK = jax.lax.top_k(logits_TE, top_k)[1]
    return jax.nn.sigmoid(jnp.take_along_axis(logits_TE, ids_TK, axis=-1)), ids_TK


def grouped_softmax_topk(
    router_logits: jax.Array, *, top_k: int, num_groups: int, topk_groups: int, routed_scaling_factor: float
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.grouped_softmax_topk`, but topk_ids are int32."""
    validation.grouped_softmax_topk(router_logits, top_k, num_groups, topk_groups, routed_scaling_factor)

    probs_TE = jax.nn.softmax(at_least_float32(router_logits), axis=-1)
    kept_TE = is_in_best_groups(best_of_groups(probs_TE, num_groups, 1), topk_groups, probs_TE.shape[1])
    ids_TK = jax.lax.top_k(jnp.where(kept_TE, probs_TE, -jnp.inf), top_k)[1]
    return jnp.take_along_axis(probs_TE, ids_TK, axis=-1) * routed_scaling_factor, ids_TK


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
    kept_TE = is_in_best_groups(best_of_groups(choice_scores_TE, num_groups, 2), topk_groups, router_logits.shape[1])
    ids_TK = jax.lax.top_k(jnp.where(kept_TE, choice_scores_TE, -jnp.inf), top_k)[1]

    weights_TK = jnp.take_along_axis(jax.nn.sigmoid(at_least_float32(router_logits)), ids_TK, axis=-1)
    if renormalize:
        weights_TK = divided_by_sum(weights_TK)
    return weights_TK * routed_scaling_factor, ids_TK


def biased_softmax_topk(
    router_logits: jax.Array, e_score_correction_bias: jax.Array, *, top_k: int, norm_min: float
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.biased_softmax_topk`, but topk_ids are int32, and the bias gets a zero gradient."""
    validation.biased_softmax_topk(router_logits, e_score_correction_bias, top_k, norm_min)

    probs_TE = jax.nn.softmax(at_least_float32(router_logits), axis=-1)
    ids_TK = jax.lax.top_k(probs_TE + at_least_float32(e_score_correction_bias), top_k)[1]
    weights_TK = jnp.take_along_axis(probs_TE, ids_TK, axis=-1)
    return _quotient(weights_TK, jnp.maximum(weights_TK.sum(axis=-1, keepdims=True), norm_min)), ids_TK


def zero_expert_topk(
    router_logits: jax.Array,
    e_score_correction_bias: jax.Array,
    *,
    top_k: int,
    num_zero_experts: int,
    routed_scaling_factor: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.zero_expert_topk`, but topk_ids are int32, and the bias gets a zero gradient."""
    validation.zero_expert_topk(router_logits, e_score_correction_bias, top_k, num_zero_experts, routed_scaling_factor)

    probs_TE = jax.nn.softmax(at_least_float32(router_logits), axis=-1)
    ids_TK = jax.lax.top_k(probs_TE + at_least_float32(e_score_correction_bias), top_k)[1]
    weights_TK = jnp.take_along_axis(probs_TE, ids_TK, axis=-1) * routed_scaling_factor
    is_identity_TK = ids_TK >= router_logits.shape[1] - num_zero_experts
    return weights_TK, ids_TK, jnp.where(is_identity_TK, weights_TK, 0).sum(axis=-1)


def sparsemixer(router_logits: jax.Array, *, jitter_eps: float) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.sparsemixer`, but topk_ids are int32."""
    validation.sparsemixer(router_logits, jitter_eps)

    logits_TE = at_least_float32(router_logits)
    ids_TK = jax.lax.top_k(logits_TE, 2)[1]
    others_TE, weights_TK = logits_TE, []
    for id_T1 in jnp.split(ids_TK, 2, axis=-1):
        highest_T1 = jnp.take_along_axis(logits_TE, id_T1, axis=-1)
        is_far_TE = (highest_T1 - logits_TE) / jnp.maximum(abs(logits_TE), highest_T1) > 2 * jitter_eps
        probs_TE = jax.nn.softmax(jnp.where(is_far_TE, -jnp.inf, others_TE), axis=-1)
        weights_TK.append(jnp.take_along_axis(probs_TE, id_T1, axis=-1))
        others_TE = jnp.put_along_axis(others_TE, id_T1, -jnp.inf, axis=-1, inplace=False)
    return jnp.concatenate(weights_TK, axis=-1), ids_TK


def hash_router(token_ids: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.routers.hash_router`, but expert_ids are int32."""
    validation.hash_router(token_ids, table)
    validation.token_ids_in_range(token_ids, vocabulary_size=table.shape[0])

    ids_T = table[token_ids].astype(jnp.int32)
    return jnp.ones(ids_T.shape, dtype=jnp.float32), ids_T


def sigmoid_choice_scores(router_logits: jax.Array, e_score_correction_bias: jax.Array) -> jax.Array:
    """Return what experts are chosen by, c = sigmoid(router_logits) + bias, [num_tokens, num_experts]."""
    return jax.nn.sigmoid(at_least_float32(router_logits)) + at_least_float32(e_score_correction_bias)


def best_of_groups(choice_scores: jax.Array, num_groups: int, best: int) -> jax.Array:
    """Return the sum of the `best` highest scores of each group (of all, if it has fewer), [num_tokens, num_groups]."""
    num_tokens, num_experts = choice_scores.shape
    scores_TGM = choice_scores.reshape(num_tokens, num_groups, num_experts // num_groups)
    return jax.lax.top_k(scores_TGM, min(best, scores_TGM.shape[-1]))[0].sum(axis=-1)


def is_in_best_groups(group_scores: jax.Array, topk_groups: int, num_experts: int) -> jax.Array:
    """Return which experts lie in the groups of highest score, [num_tokens, num_experts], bool."""
    num_groups = group_scores.shape[1]
    best_groups = jax.lax.top_k(group_scores, topk_groups)[1]
    kept_TG = jax.nn.one_hot(best_groups, num_groups, dtype=bool).any(axis=1)
    return kept_TG.repeat(num_experts // num_groups, axis=1)


def divided_by_sum(scores: jax.Array) -> jax.Array:
    """Return the scores of each token divided by their sum, and by 1e-20 where that is 0, [num_tokens, top_k]."""
    return _quotient(scores, scores.sum(axis=-1, keepdims=True) + 1e-20)
