"""Calls of routers that choose by noisy logits."""

from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_between,
    require_dtype,
    require_like,
    require_number,
    require_same_device,
    require_shape,
)
from gaugeblock.reference.validation.routers import softmax_topk


def noisy_topk(router_logits: Any, noise_logits: Any, noise: Any, top_k: int) -> None:
    """Check the arguments of `noisy_routers.noisy_topk`."""
    softmax_topk(router_logits, top_k)
    num_tokens, num_experts = router_logits.shape
    require_like("noise_logits", noise_logits, "router_logits", router_logits, num_tokens=num_tokens, num_experts=num_experts)
    _require_noise(noise, router_logits)


def ste_topk(router_logits: Any, noise: Any, top_k: int, noise_std: float) -> None:
    """Check the arguments of `noisy_routers.ste_topk`."""
    require_dtype("router_logits", router_logits, FLOATING)
    if len(router_logits.shape) == 3:
        require_shape("router_logits", router_logits, batch_size=None, sequence_length=None, num_experts=None)
    else:
        require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    require_between("top_k", top_k, 1, router_logits.shape[-1], "num_experts=")
    _require_noise(noise, router_logits)
    require_not_negative("noise_std", noise_std)


def noise_std_at(step: int, total_steps: int, anneal_fraction: float, noise_std: float) -> None:
    """Check the arguments of `noisy_routers.noise_std_at`."""
    for name, steps in (("step", step), ("total_steps", total_steps)):
        require_between(name, steps, 0, 2**63 - 1)
    require_not_negative("anneal_fraction", anneal_fraction)
    if anneal_fraction > 1:
        raise ValueError(f"anneal_fraction must be at most 1, got {anneal_fraction}")
    require_not_negative("noise_std", noise_std)


def _require_noise(noise: Any, router_logits: Any) -> None:
    require_dtype("noise", noise, FLOATING)
    if tuple(noise.shape) != tuple(router_logits.shape):
        raise ValueError(f"noise must have the shape of router_logits, {tuple(router_logits.shape)}, got {tuple(noise.shape)}")
    require_same_device("noise", noise, "router_logits", router_logits)


def require_not_negative(name: str, value: Any) -> None:
    """Check that an option is a finite number, 0 or more."""
    require_number(name, value)
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")
