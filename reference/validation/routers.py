"""Calls of routers."""

from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_between,
    require_dtype,
    require_number,
    require_same_device,
    require_shape,
)


def softmax_topk(router_logits: Any, top_k: int) -> None:
    """Check the arguments of `routers.softmax_topk`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    require_between("top_k", top_k, 1, router_logits.shape[1], "num_experts=")


def grouped_sigmoid_topk(
    router_logits: Any, e_score_correction_bias: Any, top_k: int, num_groups: int, topk_groups: int, routed_scaling_factor: float
) -> None:
    """Check the arguments of `routers.grouped_sigmoid_topk`."""
    softmax_topk(router_logits, top_k)
    num_experts = router_logits.shape[1]
    require_dtype("e_score_correction_bias", e_score_correction_bias, FLOATING)
    require_shape("e_score_correction_bias", e_score_correction_bias, num_experts=num_experts)
    require_same_device("e_score_correction_bias", e_score_correction_bias, "router_logits", router_logits)
    require_between("num_groups", num_groups, 1, num_experts, "num_experts=")
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts={num_experts}, got {num_groups}")
    require_between("topk_groups", topk_groups, 1, num_groups, "num_groups=")
    kept_experts = topk_groups * num_experts // num_groups
    require_between("top_k", top_k, 1, kept_experts, "experts in the kept groups=")
    require_number("routed_scaling_factor", routed_scaling_factor)
