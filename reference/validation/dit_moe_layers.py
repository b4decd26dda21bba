"""Calls of the MoE layer of DiT-MoE."""

from typing import Any

from gaugeblock.reference import moe_states
from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.validation.moe_layers import require_layer
from gaugeblock.reference.validation.routers import require_groups


def dit_moe(hidden_states: Any, state: Any, config: DiTMoEConfig, num_holders: int = 1) -> None:
    """Check the arguments of `dit_moe_layers.dit_moe`."""
    if not isinstance(config, DiTMoEConfig):
        raise TypeError(f"config must be a DiTMoEConfig, got {type(config).__name__}")
    batch = ("batch_size", "num_tokens")
    sizes = require_layer(hidden_states, state, moe_states.DIT_MOE, config.top_k, num_holders, batch)
    require_groups(sizes["num_experts"], config.top_k, config.num_groups, config.topk_groups)
