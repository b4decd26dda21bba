"""Losses and figures of a router's load.

Shapes: T num_tokens, E num_experts, K top_k.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
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
    is_chosen_TKE = topk_ids[..., None] == jnp.arange(num_experts)
    assignments_E = jnp.where(mask_T1, is_chosen_TKE.sum(axis=1), 0).sum(axis=0)

    num_unmasked = attention_mask.sum().clip(1)
    share_E = assignments_E.astype(probs_TE.dtype) / (num_unmasked * topk_ids.shape[1])
    probability_E = probs_TE.sum(axis=0) / num_unmasked
    return num_experts * (share_E * probability_E).sum()


def router_z_loss(router_logits: jax.Array, attention_mask: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.auxiliary_losses.router_z_loss`."""
    validation.router_z_loss(router_logits, attention_mask)

    # masked before the logsumexp too: through a NaN, its gradient of zero would be NaN
    logits_TE = jnp.where(attention_mask[:, None], at_least_float32(router_logits), 0)
    z_T = jnp.where(attention_mask, jax.nn.logsumexp(logits_TE, axis=-1), 0)
    return (z_T**2).sum() / attention_mask.sum().clip(1)
