"""MoE layers built of a router, a runner of experts and what else a layer has, by name; what does not fit fails when it is built.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import moe_parts, validation
from gaugeblock.reference.expert_layouts import to_w13
from gaugeblock.reference.jax import capacity_routers, experts, noisy_routers, routers, soft_routers
from gaugeblock.reference.jax.moe_layers import router_logits, shared_weights
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.moe_configs import MoELayerConfig

Layer = tuple[jax.Array, jax.Array, jax.Array | None]
Array = jax.Array | None


def build_moe_layer(
    *, router: str, runner: str, router_options: Mapping[str, Any], runner_options: Mapping[str, Any]
) -> Callable[..., jax.Array]:
    """As `gaugeblock.reference.torch.moe_building.build_moe_layer`."""
    moe_parts.require_fit(router, runner)
    moe_parts.require_options("router", router, router_options)
    moe_parts.require_options("runner", runner, runner_options)
    run = runner_of(runner)

    def moe_layer(hidden_states: jax.Array, gate: Array, *weights: jax.Array, **arrays: Array) -> jax.Array:
        logits_TE = None if gate is None else router_logits(hidden_states, gate)
        routing = routed(router, logits_TE, arrays, router_options)
        return run(hidden_states, *weights, *routing, **runner_options)

    return moe_layer


def build_layer(
    config: MoELayerConfig, *, mesh: Any = None, dispatchers: Mapping[str, Callable] = moe_parts.LOCAL
) -> Callable[..., Layer]:
    """As `gaugeblock.reference.torch.moe_building.build_layer`."""
    run = moe_parts.dispatched(runner_of(config.runner), config.dispatcher, mesh, dispatchers)

    def moe_layer(hidden_states: jax.Array, state: Mapping[str, jax.Array], **arrays: Array) -> Layer:
        num_experts = validation.built_layer(hidden_states, state, config.axes, config.bias, config.router_options)
        hidden_TH = at_least_float32(hidden_states)
        state = {name: at_least_float32(each) for name, each in state.items()}

        logits_TE = router_logits(hidden_TH, state[f"{config.gate}.weight"])
        if config.gate_bias:
            logits_TE = logits_TE + state[f"{config.gate}.bias"]
        if config.bias is not None:
            arrays = {**arrays, moe_parts.BIAS: state[config.bias]}
        routing = routed(config.router, logits_TE, arrays, config.router_options)

        held = None if config.splits_experts else num_experts
        weights = to_w13(state, config.expert_layout, prefix=f"{config.experts}.", num_experts=held)
        ours = (getattr(weights, name) for name in moe_parts.RUNNERS[config.runner].weights)
        out_TH = run(hidden_TH, *ours, *routing, **config.runner_options)
        if config.shared == "shared_swiglu":
            out_TH = out_TH + experts.shared_swiglu(hidden_TH, *shared_weights(state, config.shared_expert))
        if config.shared == "gated_shared_swiglu":
            shared = *shared_weights(state, config.shared_expert), state[f"{config.shared_expert}_gate.weight"]
            out_TH = out_TH + experts.gated_shared_swiglu(hidden_TH, *shared)
        return out_TH.astype(hidden_states.dtype), logits_TE, routing[1] if len(routing) > 1 else None

    return moe_layer


def routed(router: str, router_logits: Array, arrays: Mapping[str, Array], options: Mapping[str, Any]) -> tuple[jax.Array, ...]:
    """Return what a router hands on to its runner: weights and ids, both [num_tokens, top_k], or logits."""
    moe_parts.require_arrays(router, arrays)
    given: Any = (router_logits,) if moe_parts.ROUTERS[router].reads_logits else ()
    if router == "bypass":
        return given
    route = next(getattr(module, router) for module in ROUTER_MODULES if hasattr(module, router))
    chosen = route(*given, *(arrays[name] for name in moe_parts.ROUTERS[router].needs), **options)
    return tuple(each[:, None] if each.ndim == 1 else each for each in chosen[:2])


def runner_of(name: str) -> Callable[..., jax.Array]:
    """Return the runner of this name."""
    ours: Mapping[str, Callable] = {"input_scaled_swiglu": input_scaled_swiglu, "routing_swiglu": routing_swiglu}
    return ours.get(name) or getattr(experts, name)


ROUTER_MODULES = (routers, noisy_routers, capacity_routers, soft_routers)


def input_scaled_swiglu(
    hidden_states: jax.Array, w13: jax.Array, w2: jax.Array, topk_weights: jax.Array, topk_ids: jax.Array
) -> jax.Array:
    """As `gaugeblock.reference.torch.moe_building.input_scaled_swiglu`."""
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)

    scaled_TKH = at_least_float32(topk_weights)[..., None] * hidden_states[:, None]  # of the wider dtype
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
