"""Routers whose experts have room for so many tokens.

Shapes: T num_tokens, E num_experts.
"""

import math

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32


def switch_top1(router_logits: jax.Array, *, capacity_factor: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.capacity_routers.switch_top1`, but expert_ids are int32."""
    validation.switch_top1(router_logits, capacity_factor)
    num_tokens, num_experts = router_logits.shape

    probs_TE = jax.nn.softmax(at_least_float32(router_logits), axis=-1)
    ids_T = probs_TE.argmax(axis=-1).astype(jnp.int32)
    has_chosen_TE = jax.nn.one_hot(ids_T, num_experts, dtype=ids_T.dtype)
    place_T = jnp.take_along_axis(has_chosen_TE.cumsum(axis=0), ids_T[:, None], axis=-1)[:, 0]
    dropped_T = place_T > expert_capacity(num_tokens, num_experts, capacity_factor)
    weights_T = jnp.take_along_axis(probs_TE, ids_T[:, None], axis=-1)[:, 0]
    return jnp.where(dropped_T, 0, weights_T), ids_T, dropped_T


def expert_capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """As `gaugeblock.reference.torch.capacity_routers.expert_capacity`."""
    return math.ceil(num_tokens * capacity_factor / num_experts)
