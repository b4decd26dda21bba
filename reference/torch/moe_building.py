"""MoE layers built of a router, a runner of experts and what else a layer has, by name; what does not fit fails when it is built.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gaugeblock.reference import moe_parts, validation
from gaugeblock.reference.expert_layouts import to_w13
from gaugeblock.reference.moe_configs import MoELayerConfig
from gaugeblock.reference.torch import capacity_routers, experts, noisy_routers, routers, soft_routers
from gaugeblock.reference.torch.moe_layers import router_logits, shared_weights
from gaugeblock.reference.torch.precision import at_least_float32

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
Array = torch.Tensor | None


def build_moe_layer(
    *, router: str, runner: str, router_options: Mapping[str, Any], runner_options: Mapping[str, Any]
) -> Callable[..., torch.Tensor]:
    """Build a layer that sends each token through the experts that its router chose.

        router_logits = hidden_states @ gate.T
        out = runner(hidden_states, *weights, *router(router_logits, *arrays))

    Args:
        router: A name of `moe_parts.ROUTERS`; "bypass" hands the logits on, for a runner that chooses for itself.
        runner: A name of `moe_parts.RUNNERS` that takes what the router hands on.
        router_options: The keyword arguments of the router: `top_k`, ...
        runner_options: Those of the runner.

    Returns:
        A function of hidden_states [num_tokens, hidden_size], gate [num_experts, hidden_size] (None for a router that reads no
        logits), the experts' weights in the order in which the runner takes them, and, by name, the arrays that the router
        takes beside logits (`e_score_correction_bias`, `noise`, ...); it returns [num_tokens, hidden_size].

    Raises:
        ValueError: A name is unknown, the runner needs what the router does not hand on, or an option is missing or one too
            many. The function: an array is missing or one too many.

    Source: the parts of vLLM's and Diffulex's fused MoE layers.
    """
    moe_parts.require_fit(router, runner)
    moe_parts.require_options("router", router, router_options)
    moe_parts.require_options("runner", runner, runner_options)
    run = runner_of(runner)

    def moe_layer(hidden_states: torch.Tensor, gate: Array, *weights: torch.Tensor, **arrays: Array) -> torch.Tensor:
        logits_TE = None if gate is None else router_logits(hidden_states, gate)
        routing = routed(router, logits_TE, arrays, router_options)
        return run(hidden_states, *weights, *routing, **runner_options)

    return moe_layer


def build_layer(
    config: MoELayerConfig, *, mesh: Any = None, dispatchers: Mapping[str, Callable] = moe_parts.LOCAL
) -> Callable[..., Layer]:
    """Build the layer of a configuration, from a state of its parameters to what the layers of `moe_layers` return.

        router_logits = hidden_states @ gate.weight.T, plus gate.bias if there is one
        out = runner(hidden_states, experts, router(router_logits)) + shared expert

    Args:
        config: The parts; `moe_configs` has presets of published models, and reads their public configs.
        mesh: The ranks that experts are spread over; without need where the dispatcher is "local".
        dispatchers: By name, how a runner becomes one of experts that are spread over a mesh. There is none here but "local":
            realms that spread experts hand theirs in.

    Returns:
        A function of hidden_states [num_tokens, hidden_size], of `state`, which has the entries `config.axes` and
        `config.bias`, and, by name, of the other arrays that the router takes (`noise`, ...). It returns, as
        `moe_layers.mixtral_moe` does, hidden_states_out [num_tokens, hidden_size], router_logits [num_tokens, num_experts] and
        topk_ids [num_tokens, top_k], which are None where the runner chooses for itself.

    Raises:
        ValueError: A dispatcher lacks its mesh, or is not among `dispatchers`. The function, with TypeErrors: as
            `moe_layers.mixtral_moe`.

    Source: the parts of vLLM's and Diffulex's fused MoE layers.
    """
    run = moe_parts.dispatched(runner_of(config.runner), config.dispatcher, mesh, dispatchers)

    def moe_layer(hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], **arrays: Array) -> Layer:
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
        return out_TH.to(hidden_states.dtype), logits_TE, routing[1] if len(routing) > 1 else None

    return moe_layer


def routed(
    router: str, router_logits: Array, arrays: Mapping[str, Array], options: Mapping[str, Any]
) -> tuple[torch.Tensor, ...]:
    """Return what a router hands on to its runner: weights and ids, both [num_tokens, top_k], or logits."""
    moe_parts.require_arrays(router, arrays)
    given: Any = (router_logits,) if moe_parts.ROUTERS[router].reads_logits else ()
    if router == "bypass":
        return given
    route = next(getattr(module, router) for module in ROUTER_MODULES if hasattr(module, router))
    chosen = route(*given, *(arrays[name] for name in moe_parts.ROUTERS[router].needs), **options)
    return tuple(each[:, None] if each.ndim == 1 else each for each in chosen[:2])


def runner_of(name: str) -> Callable[..., torch.Tensor]:
    """Return the runner of this name."""
    ours: Mapping[str, Callable] = {"input_scaled_swiglu": input_scaled_swiglu, "routing_swiglu": routing_swiglu}
    return ours.get(name) or getattr(experts, name)


ROUTER_MODULES = (routers, noisy_routers, capacity_routers, soft_routers)


def input_scaled_swiglu(
    hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts to each token times its weight, and add up their outputs.

        out[t] = sum over j of w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ (topk_weights[t, j] * hidden_states[t]),  e = topk_ids[t, j]

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows.
        w2: [num_experts, hidden_size, intermediate_size].
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs) and rounded once.

    Raises: as `experts.fused_swiglu`.

    Source: Llama 4 (`Llama4TextMoe` of transformers).
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)

    scaled_TKH = at_least_float32(topk_weights)[..., None] * hidden_states[:, None]  # of the wider dtype
    scaled_NH, ids_N1 = scaled_TKH.flatten(0, 1), topk_ids.reshape(-1, 1)
    ones_N1 = torch.ones_like(ids_N1, dtype=scaled_NH.dtype)
    out_NH = experts.fused_swiglu(scaled_NH, w13.to(scaled_NH.dtype), w2.to(scaled_NH.dtype), ones_N1, ids_N1)
    return out_NH.reshape(scaled_TKH.shape).sum(dim=1).to(hidden_states.dtype)


def routing_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    router_logits: torch.Tensor,
    *,
    top_k: int,
    renormalize: bool,
) -> torch.Tensor:
    """Choose by `routers.softmax_topk`, and apply `experts.fused_swiglu`: a runner that needs no router."""
    routed = routers.softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return experts.fused_swiglu(hidden_states, w13, w2, *routed)
