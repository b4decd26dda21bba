"""Calls of Mixture-of-Experts layers whose routers choose among groups of experts."""

from typing import Any

from gaugeblock.reference import moe_states
from gaugeblock.reference.validation.arrays import require_number
from gaugeblock.reference.validation.moe_layers import require_layer
from gaugeblock.reference.validation.routers import require_groups


def deepseek_v2_moe(
    hidden_states: Any,
    state: Any,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    routed_scaling_factor: float,
    num_holders: int = 1,
) -> None:
    """Check the arguments of `grouped_moe_layers.deepseek_v2_moe`."""
    _layer(hidden_states, state, moe_states.DEEPSEEK_V2, top_k, num_groups, topk_groups, routed_scaling_factor, num_holders)


def deepseek_v3_moe(
    hidden_states: Any,
    state: Any,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    routed_scaling_factor: float,
    num_holders: int = 1,
) -> None:
    """Check the arguments of `grouped_moe_layers.deepseek_v3_moe`."""
    _layer(hidden_states, state, moe_states.DEEPSEEK_V3, top_k, num_groups, topk_groups, routed_scaling_factor, num_holders)


def _layer(
    hidden_states: Any,
    state: Any,
    axes_of: moe_states.StateAxes,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    routed_scaling_factor: float,
    num_holders: int,
) -> None:
    sizes = require_layer(hidden_states, state, axes_of, top_k, num_holders)
    require_groups(sizes["num_experts"], top_k, num_groups, topk_groups)
    require_number("routed_scaling_factor", routed_scaling_factor)
