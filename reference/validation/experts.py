"""Calls of experts."""

from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    dtype_name,
    require_dtype,
    require_same_device,
    require_shape,
    require_values,
)


def fused_swiglu(hidden_states: Any, w13: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> None:
    """Check the arguments of `experts.fused_swiglu`; the ids' values are left to `expert_ids_in_range`."""
    require_dtype("hidden_states", hidden_states, FLOATING)
    require_dtype("w13", w13, (dtype_name(hidden_states),))
    require_dtype("w2", w2, (dtype_name(hidden_states),))
    require_dtype("topk_weights", topk_weights, FLOATING)
    require_dtype("topk_ids", topk_ids, INTEGER)

    require_shape("hidden_states", hidden_states, num_tokens=None, hidden_size=None)
    num_tokens, hidden_size = hidden_states.shape
    require_shape("w13", w13, num_experts=None, twice_intermediate_size=None, hidden_size=hidden_size)
    num_experts, gate_and_up = w13.shape[:2]
    if num_experts == 0:
        raise ValueError(f"w13 must hold at least one expert, got {tuple(w13.shape)}")
    if gate_and_up % 2:
        raise ValueError(f"w13 must hold as many gate rows as up rows, got {gate_and_up} rows")
    require_shape("w2", w2, num_experts=num_experts, hidden_size=hidden_size, intermediate_size=gate_and_up // 2)
    require_shape("topk_ids", topk_ids, num_tokens=num_tokens, top_k=None)
    require_shape("topk_weights", topk_weights, num_tokens=num_tokens, top_k=topk_ids.shape[1])

    for name, array in (("w13", w13), ("w2", w2), ("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        require_same_device(name, array, "hidden_states", hidden_states)


def expert_ids_in_range(topk_ids: Any, num_experts: int) -> None:
    """Check that every id names an expert, unless it cannot be read: a JAX tracer, a CUDA graph's capture."""
    require_values("topk_ids", topk_ids, num_experts - 1)
