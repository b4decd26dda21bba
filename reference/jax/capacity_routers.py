"""Routers whose experts have room for so many tokens.

Shapes: T num_tokens, E num_experts, N choices of all tokens in the order in which they ask for room, C tokens of an expert.
"""

import math

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import SMALLEST_WEIGHT_SUM, SecondExpertPolicy
from gaugeblock.reference.jax.precision import at_least_float32


def switch_top1(router_logits: jax.Array, *, capacity_factor: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.capacity_routers.switch_top1`, but expert_ids are int32."""
    validation.switch_top1(router_logits, capacity_factor)
    num_tokens, num_experts = router_logits.shape

    probs_TE = jax.nn.softmax(at_least_float32(router_logits), axis=-1)
    ids_T = probs_TE.argmax(axis=-1).astype(jnp.int32)
    place_T = places(ids_T, jnp.ones_like(ids_T), num_experts)
    dropped_T = place_T > expert_capacity(num_tokens, num_experts, capacity_factor)
    weights_T = jnp.take_along_axis(probs_TE, ids_T[:, None], axis=-1)[:, 0]
    return jnp.where(dropped_T, 0, weights_T), ids_T, dropped_T


def gshard_top2(
    router_logits: jax.Array,
    noise: jax.Array | None,
    attention_mask: jax.Array,
    *,
    second_expert_policy: SecondExpertPolicy,
    normalize_before_dropping: bool,
    capacity_factor: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.capacity_routers.gshard_top2`, but topk_ids are int32."""
    validation.gshard_top2(router_logits, noise, attention_mask, second_expert_policy, capacity_factor)
    num_tokens, num_experts = router_logits.shape

    # masked before the softmax: through a NaN, its gradient of zero would be NaN
    logits_TE = jnp.where(attention_mask[:, None], at_least_float32(router_logits), 0)
    probs_TE = jax.nn.softmax(logits_TE, axis=-1)
    first_T1 = probs_TE.argmax(axis=-1, keepdims=True)
    noise_TE = logits_TE if noise is None else noise  # "all" reads neither
    scores_TE = logits_TE + noise_TE if second_expert_policy == "sampling" else logits_TE
    ids_T2 = jax.lax.top_k(jnp.put_along_axis(scores_TE, first_T1, jnp.inf, axis=-1, inplace=False), 2)[1]
    weights_T2 = jnp.take_along_axis(probs_TE, ids_T2, axis=-1)
    if normalize_before_dropping:
        weights_T2 = weights_T2 / weights_T2.sum(axis=-1, keepdims=True)

    asks_T2 = attention_mask[:, None].repeat(2, axis=1)
    if second_expert_policy == "random":
        is_drawn_T2 = 2 * weights_T2 > jnp.take_along_axis(noise_TE, ids_T2, axis=-1)
        asks_T2 = asks_T2.at[:, 1].set(asks_T2[:, 1] & is_drawn_T2[:, 1])
    place_T2 = places(ids_T2.T.flatten(), asks_T2.T.flatten(), num_experts).reshape(2, num_tokens).T
    dropped_T2 = ~asks_T2 | (place_T2 > expert_capacity(num_tokens, num_experts, capacity_factor))
    kept_T2 = jnp.where(dropped_T2, 0, weights_T2)
    if not normalize_before_dropping:
        kept_T2 = kept_T2 / kept_T2.sum(axis=-1, keepdims=True).clip(min=SMALLEST_WEIGHT_SUM)
    return kept_T2, ids_T2, dropped_T2


def expert_choice(router_logits: jax.Array, *, capacity_factor: float) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.capacity_routers.expert_choice`, but token_ids are int32."""
    validation.expert_choice(router_logits, capacity_factor)
    num_tokens, num_experts = router_logits.shape

    probs_ET = jax.nn.softmax(at_least_float32(router_logits), axis=-1).T
    ids_EC = jax.lax.top_k(probs_ET, chosen_tokens(num_tokens, num_experts, capacity_factor))[1]
    return jnp.take_along_axis(probs_ET, ids_EC, axis=-1), ids_EC


def places(ids_N: jax.Array, asks_N: jax.Array, num_experts: int) -> jax.Array:
    """As `gaugeblock.reference.torch.capacity_routers.places`."""
    asked_NE = jax.nn.one_hot(ids_N, num_experts, dtype=ids_N.dtype) * asks_N[:, None]
    return jnp.take_along_axis(asked_NE.cumsum(axis=0), ids_N[:, None], axis=-1)[:, 0]


def expert_capacity(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """As `gaugeblock.reference.torch.capacity_routers.expert_capacity`."""
    return math.ceil(num_tokens * capacity_factor / num_experts)


def chosen_tokens(num_tokens: int, num_experts: int, capacity_factor: float) -> int:
    """As `gaugeblock.reference.torch.capacity_routers.chosen_tokens`."""
    return min(expert_capacity(num_tokens, num_experts, capacity_factor), num_tokens)
