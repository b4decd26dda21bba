"""Calls of routers whose experts have room for so many tokens."""

from typing import Any

from gaugeblock.reference.validation.arrays import FLOATING, require_dtype, require_positive, require_shape


def switch_top1(router_logits: Any, capacity_factor: float) -> None:
    """Check the arguments of `capacity_routers.switch_top1`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    if router_logits.shape[1] == 0:
        raise ValueError(f"router_logits must hold at least one expert, got {tuple(router_logits.shape)}")
    require_positive("capacity_factor", capacity_factor)
