"""Calls of dispatch."""

import sys
from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    require_between,
    require_dtype,
    require_same_device,
    require_shape,
    require_values,
)


def sort_by_expert(topk_ids: Any, num_experts: Any) -> None:
    """Check the arguments of `dispatch.sort_by_expert`; the ids' values are left to `expert_ids_in_range`."""
    require_dtype("topk_ids", topk_ids, INTEGER)
    require_shape("topk_ids", topk_ids, num_tokens=None, top_k=None)
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids must hold at least one expert per token, got {tuple(topk_ids.shape)}")
    require_between("num_experts", num_experts, 1, sys.maxsize)


def align_to_blocks(topk_ids: Any, num_experts: Any, block_size: Any) -> None:
    """Check the arguments of `dispatch.align_to_blocks`; the ids' values are left to `expert_ids_in_range`."""
    sort_by_expert(topk_ids, num_experts)
    require_between("block_size", block_size, 1, sys.maxsize)


def permute(hidden_states: Any, order: Any, top_k: Any) -> None:
    """Check the arguments of `dispatch.permute`; the values of `order` are left to `routed_rows_in_range`."""
    require_dtype("hidden_states", hidden_states, FLOATING)
    require_shape("hidden_states", hidden_states, num_tokens=None, hidden_size=None)
    require_dtype("order", order, INTEGER)
    require_shape("order", order, num_rows=None)
    require_same_device("order", order, "hidden_states", hidden_states)
    require_between("top_k", top_k, 1, sys.maxsize)


def unpermute(rows: Any, inverse: Any, topk_weights: Any) -> None:
    """Check the arguments of `dispatch.unpermute`; the values of `inverse` are left to `places_in_range`."""
    require_dtype("rows", rows, FLOATING)
    require_shape("rows", rows, num_rows=None, hidden_size=None)
    require_dtype("inverse", inverse, INTEGER)
    require_shape("inverse", inverse, num_tokens=None, top_k=None)
    require_dtype("topk_weights", topk_weights, FLOATING)
    require_shape("topk_weights", topk_weights, num_tokens=inverse.shape[0], top_k=inverse.shape[1])
    for name, array in (("inverse", inverse), ("topk_weights", topk_weights)):
        require_same_device(name, array, "rows", rows)


def routed_rows_in_range(order: Any, num_rows: int) -> None:
    """Check that every place has a routed row, unless it cannot be read."""
    require_values("order", order, num_rows - 1)


def places_in_range(inverse: Any, num_rows: int) -> None:
    """Check that every routed row has a place, unless it cannot be read."""
    require_values("inverse", inverse, num_rows - 1)
