"""MoE layers built of a router and a runner of experts, by name; a pair that does not fit fails when the layer is built.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import moe_parts, validation
from gaugeblock.reference.jax import experts, routers
from gaugeblock.reference.jax.precision import at_least_float32


def build_moe_layer(
    *, router: str, runner: str, router_options: Mapping[str, Any], runner_options: Mapping[str, Any]
) -> Callable[..., jax.Array]:
    """As `gaugeblock.reference.torch.moe_building.build_moe_layer`."""
    moe_parts.require_fit(router, runner)
    route: Callable = bypass if router == "bypass" else getattr(routers, router)
    ours: Mapping[str, Callable] = {"input_scaled_swiglu": input_scaled_swiglu, "routing_swiglu": routing_swiglu}
    run = ours.get(runner) or getattr(experts, runner)

    def moe_layer(hidden_states: jax.Array, gate: jax.Array, *weights: jax.Array) -> jax.Array:
        logits_TE = jnp.matmul(at_least_float32(hidden_states), at_least_float32(gate).mT, precision="highest")
        routed = route(logits_TE, **router_options)
        return run(hidden_states, *weights, *routed, **runner_options)

    return moe_layer


def bypass(router_logits: jax.Array) -> tuple[jax.Array]:
    """Return the logits, so that the runner chooses."""
    return (router_logits,)


def input_scaled_swiglu(
    hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array
) -> jax.Array:
    """As `gaugeblock.reference.torch.moe_building.input_scaled_swiglu`."""
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    scaled_TKH = at_least_float32(topk_weights)[..., None] * at_least_float32(hidden_states)[:, None]
    scaled_NH, ids_N1 = scaled_TKH.reshape(-1, hidden_states.shape[1]), topk_ids.reshape(-1, 1)
    ones_N1 = jnp.ones_like(ids_N1, dtype=scaled_NH.dtype)
    out_NH = experts.fused_swiglu(scaled_NH, w13.astype(scaled_NH.dtype), w2.astype(scaled_NH.dtype), ones_N1, ids_N1)
    return out_NH.reshape(scaled_TKH.shape).sum(axis=1).astype(hidden_states.dtype)


def routing_swiglu(
    hidden_states: jax.Array,
    w13: jax.Array,
    w2: jax.Array,
    router_logits: jax.Array,
    *,
    top_k: int,
    renormalize: bool,
) -> jax.Array:
    """Choose by `routers.softmax_topk`, and apply `experts.fused_swiglu`: a runner that needs no router."""
    routed = routers.softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return experts.fused_swiglu(hidden_states, w13, w2, *routed)
