"""Calls of quantized experts."""

import sys
from typing import Any

from gaugeblock.reference.validation.arrays import FLOATING, require_between, require_dtype, require_same_device, require_shape
from gaugeblock.reference.validation.experts import require_experts, require_gate_and_up, require_routing, require_tokens

E4M3 = ("float8_e4m3fn", "float64")  # of which the oracle's weights are


def fused_swiglu_int8(
    hidden_states: Any, w13: Any, w13_scales: Any, w2: Any, w2_scales: Any, topk_weights: Any, topk_ids: Any
) -> None:
    """Check the arguments of `quantized_experts.fused_swiglu_int8`; the ids' values are left to `expert_ids_in_range`."""
    _weights_and_scales(hidden_states, w13, w13_scales, w2, w2_scales, ("int8",))
    num_experts, gate_and_up, hidden_size = w13.shape
    require_shape("w13_scales", w13_scales, num_experts=num_experts, twice_intermediate_size=gate_and_up)
    require_shape("w2_scales", w2_scales, num_experts=num_experts, hidden_size=hidden_size)
    require_routing(hidden_states, topk_weights, topk_ids)


def fused_swiglu_fp8(
    hidden_states: Any, w13: Any, w13_scales: Any, w2: Any, w2_scales: Any, topk_weights: Any, topk_ids: Any, block_size: Any
) -> None:
    """Check the arguments of `quantized_experts.fused_swiglu_fp8`; the ids' values are left to `expert_ids_in_range`."""
    require_between("block_size", block_size, 1, sys.maxsize)
    _weights_and_scales(hidden_states, w13, w13_scales, w2, w2_scales, E4M3)
    for name, scales, weights in (("w13_scales", w13_scales, w13), ("w2_scales", w2_scales, w2)):
        num_experts, row_blocks, column_blocks = weights.shape[0], *(-(-size // block_size) for size in weights.shape[1:])
        require_shape(name, scales, num_experts=num_experts, row_blocks=row_blocks, column_blocks=column_blocks)
    require_routing(hidden_states, topk_weights, topk_ids)


def _weights_and_scales(hidden_states: Any, w13: Any, w13_scales: Any, w2: Any, w2_scales: Any, dtypes: tuple[str, ...]) -> None:
    """Tokens, and weights of experts that have a gate, beside scales of any shape."""
    require_tokens(hidden_states)
    for name, weights in (("w13", w13), ("w2", w2)):
        require_dtype(name, weights, dtypes)
    for name, scales in (("w13_scales", w13_scales), ("w2_scales", w2_scales)):
        require_dtype(name, scales, FLOATING)
    hidden_size = hidden_states.shape[1]
    require_shape("w13", w13, num_experts=None, twice_intermediate_size=None, hidden_size=hidden_size)
    require_experts("w13", w13)
    down = {"num_experts": w13.shape[0], "hidden_size": hidden_size, "intermediate_size": require_gate_and_up(w13)}
    require_shape("w2", w2, **down)
    for name, array in (("w13", w13), ("w13_scales", w13_scales), ("w2", w2), ("w2_scales", w2_scales)):
        require_same_device(name, array, "hidden_states", hidden_states)
