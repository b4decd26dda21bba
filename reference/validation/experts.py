"""Calls of experts."""

from typing import Any

from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    require_dtype,
    require_like,
    require_number,
    require_one_of,
    require_positive,
    require_same_device,
    require_shape,
    require_values,
)


def fused_swiglu(hidden_states: Any, w13: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> None:
    """Check the arguments of `experts.fused_swiglu`; the ids' values are left to `expert_ids_in_range`."""
    require_tokens(hidden_states)
    _gated_experts(hidden_states, w13, w2)
    require_routing(hidden_states, topk_weights, topk_ids)


def fused_geglu(hidden_states: Any, w13: Any, w2: Any, topk_weights: Any, topk_ids: Any, approximate: Any) -> None:
    """Check the arguments of `experts.fused_geglu`; the ids' values are left to `expert_ids_in_range`."""
    fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    require_one_of("approximate", approximate, GeluApproximation)


def fused_gelu_mlp(
    hidden_states: Any, w1: Any, b1: Any, w2: Any, b2: Any, topk_weights: Any, topk_ids: Any, approximate: Any
) -> None:
    """Check the arguments of `experts.fused_gelu_mlp`; the ids' values are left to `expert_ids_in_range`."""
    require_tokens(hidden_states)
    hidden_size = hidden_states.shape[1]
    require_like("w1", w1, "hidden_states", hidden_states, num_experts=None, intermediate_size=None, hidden_size=hidden_size)
    num_experts, intermediate_size = w1.shape[:2]
    require_experts("w1", w1)
    require_like("b1", b1, "hidden_states", hidden_states, num_experts=num_experts, intermediate_size=intermediate_size)
    down = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    require_like("w2", w2, "hidden_states", hidden_states, **down)
    require_like("b2", b2, "hidden_states", hidden_states, num_experts=num_experts, hidden_size=hidden_size)
    require_routing(hidden_states, topk_weights, topk_ids)
    require_one_of("approximate", approximate, GeluApproximation)


def fused_swiglu_oai(
    hidden_states: Any,
    w13: Any,
    b13: Any,
    w2: Any,
    b2: Any,
    topk_weights: Any,
    topk_ids: Any,
    alpha: Any,
    limit: Any,
) -> None:
    """Check the arguments of `experts.fused_swiglu_oai`; the ids' values are left to `expert_ids_in_range`."""
    require_tokens(hidden_states)
    _gated_experts(hidden_states, w13, w2)
    num_experts, gate_and_up = w13.shape[:2]
    require_like("b13", b13, "hidden_states", hidden_states, num_experts=num_experts, twice_intermediate_size=gate_and_up)
    require_like("b2", b2, "hidden_states", hidden_states, num_experts=num_experts, hidden_size=hidden_states.shape[1])
    require_routing(hidden_states, topk_weights, topk_ids)
    require_number("alpha", alpha)
    require_positive("limit", limit)


def shared_swiglu(hidden_states: Any, w13: Any, w2: Any) -> None:
    """Check the arguments of `experts.shared_swiglu`."""
    require_tokens(hidden_states)
    hidden_size = hidden_states.shape[1]
    require_like("w13", w13, "hidden_states", hidden_states, twice_intermediate_size=None, hidden_size=hidden_size)
    intermediate_size = require_gate_and_up(w13)
    require_like("w2", w2, "hidden_states", hidden_states, hidden_size=hidden_size, intermediate_size=intermediate_size)


def gated_shared_swiglu(hidden_states: Any, w13: Any, w2: Any, shared_gate: Any) -> None:
    """Check the arguments of `experts.gated_shared_swiglu`."""
    shared_swiglu(hidden_states, w13, w2)
    require_like("shared_gate", shared_gate, "hidden_states", hidden_states, one=1, hidden_size=hidden_states.shape[1])


def expert_ids_in_range(topk_ids: Any, num_experts: int) -> None:
    """Check that every id names an expert, unless it cannot be read: a JAX tracer, a CUDA graph's capture."""
    require_values("topk_ids", topk_ids, num_experts - 1)


def require_tokens(hidden_states: Any) -> None:
    require_dtype("hidden_states", hidden_states, FLOATING)
    require_shape("hidden_states", hidden_states, num_tokens=None, hidden_size=None)


def _gated_experts(hidden_states: Any, w13: Any, w2: Any) -> None:
    """Weights of experts that have a gate."""
    hidden_size = hidden_states.shape[1]
    up = {"num_experts": None, "twice_intermediate_size": None, "hidden_size": hidden_size}
    require_like("w13", w13, "hidden_states", hidden_states, **up)
    require_experts("w13", w13)
    down = {"num_experts": w13.shape[0], "hidden_size": hidden_size, "intermediate_size": require_gate_and_up(w13)}
    require_like("w2", w2, "hidden_states", hidden_states, **down)


def require_experts(name: str, weights: Any) -> None:
    if weights.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one expert, got {tuple(weights.shape)}")


def require_gate_and_up(w13: Any) -> int:
    """As many rows as up has."""
    gate_and_up = int(w13.shape[-2])
    if gate_and_up % 2:
        raise ValueError(f"w13 must hold as many gate rows as up rows, got {gate_and_up} rows")
    return gate_and_up // 2


def require_routing(hidden_states: Any, topk_weights: Any, topk_ids: Any) -> None:
    """Weights and ids of each token's experts."""
    require_dtype("topk_weights", topk_weights, FLOATING)
    require_dtype("topk_ids", topk_ids, INTEGER)
    require_shape("topk_ids", topk_ids, num_tokens=hidden_states.shape[0], top_k=None)
    require_shape("topk_weights", topk_weights, num_tokens=hidden_states.shape[0], top_k=topk_ids.shape[1])
    for name, array in (("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        require_same_device(name, array, "hidden_states", hidden_states)
