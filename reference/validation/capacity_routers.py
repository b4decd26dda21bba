"""Calls of routers whose experts have room for so many tokens."""

from typing import Any

from gaugeblock.reference.configs import SecondExpertPolicy
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_dtype,
    require_one_of,
    require_positive,
    require_same_device,
    require_shape,
)
from gaugeblock.reference.validation.auxiliary_losses import router_z_loss


def switch_top1(router_logits: Any, capacity_factor: float) -> None:
    """Check the arguments of `capacity_routers.switch_top1`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    if router_logits.shape[1] == 0:
        raise ValueError(f"router_logits must hold at least one expert, got {tuple(router_logits.shape)}")
    require_positive("capacity_factor", capacity_factor)


def gshard_top2(
    router_logits: Any, noise: Any, attention_mask: Any, second_expert_policy: SecondExpertPolicy, capacity_factor: float
) -> None:
    """Check the arguments of `capacity_routers.gshard_top2`."""
    router_z_loss(router_logits, attention_mask)
    num_tokens, num_experts = router_logits.shape
    if num_experts < 2:
        raise ValueError(f"router_logits must hold at least two experts, got {tuple(router_logits.shape)}")
    require_one_of("second_expert_policy", second_expert_policy, SecondExpertPolicy)
    if noise is not None:
        require_dtype("noise", noise, FLOATING)
        require_shape("noise", noise, num_tokens=num_tokens, num_experts=num_experts)
        require_same_device("noise", noise, "router_logits", router_logits)
    elif second_expert_policy != "all":
        raise ValueError(f"noise must be given for the policy {second_expert_policy!r}, got None")
    require_positive("capacity_factor", capacity_factor)


def expert_choice(router_logits: Any, capacity_factor: float) -> None:
    """Check the arguments of `capacity_routers.expert_choice`."""
    switch_top1(router_logits, capacity_factor)
