"""Losses and figures of a router's load.

Shapes: T num_tokens, E num_experts, K top_k; of sequences, B batch_size, T sequence_length.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import ScoreFunction
from gaugeblock.reference.jax.precision import at_least_float32


def load_balancing_loss(router_logits: jax.Array, topk_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.auxiliary_losses.load_balancing_loss`."""
    validation.load_balancing_loss(router_logits, topk_ids, attention_mask)
    validation.expert_ids_in_range(topk_ids, num_experts=router_logits.shape[1])

    mask_T1 = attention_mask[:, None]
    # masked before the softmax too: through a NaN, its gradient of zero would be NaN
    logits_TE = jnp.where(mask_T1, at_least_float32(router_logits), 0)
    probs_TE = jnp.where(mask_T1, jax.nn.softmax(logits_TE, axis=-1), 0)
    num_experts = router_logits.shape[1]
    assignments_E = assignments(topk_ids, attention_mask, num_experts)

    num_unmasked = attention_mask.sum().clip(1)
    share_E = assignments_E.astype(probs_TE.dtype) / (num_unmasked * topk_ids.shape[1])
    probability_E = probs_TE.sum(axis=0) / num_unmasked
    return num_experts * (share_E * probability_E).sum()


def sequence_balance_loss(
    router_logits: jax.Array, topk_ids: jax.Array, attention_mask: jax.Array, *, scores: ScoreFunction
) -> jax.Array:
    """As `gaugeblock.reference.torch.auxiliary_losses.sequence_balance_loss`."""
    validation.sequence_balance_loss(router_logits, topk_ids, attention_mask, scores)
    validation.expert_ids_in_range(topk_ids, num_experts=router_logits.shape[2])

    mask_BT1 = attention_mask[..., None]
    # masked before the softmax too: through a NaN, its gradient of zero would be NaN
    logits_BTE = jnp.where(mask_BT1, at_least_float32(router_logits), 0)
    probs_BTE = jnp.where(mask_BT1, normalized_scores(logits_BTE, scores), 0)
    num_experts, top_k = router_logits.shape[2], topk_ids.shape[2]
    assignments_BE = assignments(topk_ids, attention_mask, num_experts)

    num_unmasked_B1 = attention_mask.sum(axis=1, keepdims=True).clip(1)
    load_BE = num_experts * assignments_BE.astype(probs_BTE.dtype) / (num_unmasked_B1 * top_k)
    probability_BE = probs_BTE.sum(axis=1) / num_unmasked_B1
    return (load_BE * probability_BE).sum() / attention_mask.any(axis=1).sum().clip(1)


def normalized_scores(router_logits: jax.Array, scores: ScoreFunction) -> jax.Array:
    """Return each token's scores divided by their sum, [..., num_experts], dtype as router_logits."""
    # s / sum of s is the softmax of log s, which has a value also where every s underflows
    log_scores = jax.nn.log_sigmoid(router_logits) if scores == "sigmoid" else router_logits
    return jax.nn.softmax(log_scores, axis=-1)


def router_z_loss(router_logits: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.auxiliary_losses.router_z_loss`."""
    validation.router_z_loss(router_logits, attention_mask)

    # masked before the logsumexp too: through a NaN, its gradient of zero would be NaN
    logits_TE = jnp.where(attention_mask[:, None], at_least_float32(router_logits), 0)
    z_T = jnp.where(attention_mask, jax.nn.logsumexp(logits_TE, axis=-1), 0)
    return (z_T**2).sum() / attention_mask.sum().clip(1)


def routing_entropy(router_logits: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.auxiliary_losses.routing_entropy`."""
    validation.routing_entropy(router_logits, attention_mask)

    # masked before the softmax too: through a NaN, its gradient of zero would be NaN
    logits_TE = jnp.where(attention_mask[:, None], at_least_float32(router_logits), 0)
    log_probs_TE = jax.nn.log_softmax(logits_TE, axis=-1)
    # a probability of 0 adds nothing: neither 0 * ln(0) nor its gradient is NaN so
    summands_TE = jnp.exp(log_probs_TE) * jnp.where(log_probs_TE == -jnp.inf, 0, log_probs_TE)
    entropy_T = jnp.where(attention_mask, -summands_TE.sum(axis=-1), 0)
    return entropy_T.sum() / attention_mask.sum().clip(1)


def expert_load(topk_ids: jax.Array, attention_mask: jax.Array, *, num_experts: int) -> jax.Array:
    """As `gaugeblock.reference.torch.auxiliary_losses.expert_load`, but counts are int32."""
    validation.expert_load(topk_ids, attention_mask, num_experts)
    validation.expert_ids_in_range(topk_ids, num_experts=num_experts)

    return assignments(topk_ids, attention_mask, num_experts)


def correction_bias_update(e_score_correction_bias: jax.Array, tokens_per_expert: jax.Array, *, update_rate: float) -> jax.Array:
    """As `gaugeblock.reference.torch.auxiliary_losses.correction_bias_update`."""
    validation.correction_bias_update(e_score_correction_bias, tokens_per_expert, update_rate)

    load_E = tokens_per_expert.astype(jnp.promote_types(tokens_per_expert.dtype, jnp.int32))
    total, num_experts = load_E.sum(), load_E.shape[0]
    # what is left of the division makes the mean larger than the integer that it is rounded down to
    sign_E = jnp.sign(2 * (total // num_experts - load_E) + jnp.sign(total % num_experts))
    return jax.lax.stop_gradient(e_score_correction_bias) + update_rate * sign_E


def assignments(topk_ids: jax.Array, attention_mask: jax.Array, num_experts: int) -> jax.Array:
    """Count how often the tokens that count choose each expert, [..., num_experts] for ids of [..., num_tokens, top_k]."""
    is_chosen_TKE = topk_ids[..., None] == jnp.arange(num_experts)
    return jnp.where(attention_mask[..., None], is_chosen_TKE.sum(axis=-2), 0).sum(axis=-2)
