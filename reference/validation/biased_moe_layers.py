"""Calls of Mixture-of-Experts layers that have biases."""

from typing import Any

from gaugeblock.reference import moe_states
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_dtype,
    require_number,
    require_positive,
    require_same_device,
    require_shape,
)
from gaugeblock.reference.validation.moe_layers import require_layer
from gaugeblock.reference.validation.noisy_routers import require_not_negative


def gpt_oss_moe(hidden_states: Any, state: Any, top_k: int, alpha: float, limit: float, num_holders: int = 1) -> None:
    """Check the arguments of `biased_moe_layers.gpt_oss_moe`."""
    require_layer(hidden_states, state, moe_states.GPT_OSS, top_k, num_holders)
    require_number("alpha", alpha)
    require_positive("limit", limit)


def upcycled_gpt2_moe(hidden_states: Any, state: Any, noise: Any, top_k: int, noise_std: float, num_holders: int = 1) -> None:
    """Check the arguments of `biased_moe_layers.upcycled_gpt2_moe`."""
    sizes = require_layer(hidden_states, state, moe_states.UPCYCLED_GPT2, top_k, num_holders)
    require_dtype("noise", noise, FLOATING)
    require_shape("noise", noise, num_tokens=hidden_states.shape[0], num_experts=sizes["num_experts"])
    require_same_device("noise", noise, "hidden_states", hidden_states)
    require_not_negative("noise_std", noise_std)
