"""MoE layers built of a router and a runner of experts, by name; a pair that does not fit fails when the layer is built.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gaugeblock.reference import moe_parts, validation
from gaugeblock.reference.torch import experts, routers
from gaugeblock.reference.torch.precision import at_least_float32


def build_moe_layer(
    *, router: str, runner: str, router_options: Mapping[str, Any], runner_options: Mapping[str, Any]
) -> Callable[..., torch.Tensor]:
    """Build a layer that sends each token through the experts that its router chose.

        router_logits = hidden_states @ gate.T
        out = runner(hidden_states, *weights, *router(router_logits))

    Args:
        router: A name of `moe_parts.ROUTERS`; "bypass" hands the logits on, for a runner that chooses for itself.
        runner: A name of `moe_parts.RUNNERS` that takes what the router hands on.
        router_options: The keyword arguments of the router: `top_k`, ...
        runner_options: Those of the runner.

    Returns:
        A function of hidden_states [num_tokens, hidden_size], gate [num_experts, hidden_size], and the experts' weights in
        the order in which the runner takes them; it returns [num_tokens, hidden_size].

    Raises:
        ValueError: A name is unknown, or the runner needs what the router does not hand on.

    Source: the parts of vLLM's and Diffulex's fused MoE layers.
    """
    moe_parts.require_fit(router, runner)
    route: Callable = bypass if router == "bypass" else getattr(routers, router)
    ours: Mapping[str, Callable] = {"input_scaled_swiglu": input_scaled_swiglu, "routing_swiglu": routing_swiglu}
    run = ours.get(runner) or getattr(experts, runner)

    def moe_layer(hidden_states: torch.Tensor, gate: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        logits_TE = at_least_float32(hidden_states) @ at_least_float32(gate).mT
        routed = route(logits_TE, **router_options)
        return run(hidden_states, *weights, *routed, **runner_options)

    return moe_layer


def bypass(router_logits: torch.Tensor) -> tuple[torch.Tensor]:
    """Return the logits, so that the runner chooses."""
    return (router_logits,)


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
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    scaled_TKH = at_least_float32(topk_weights)[..., None] * at_least_float32(hidden_states)[:, None]
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
