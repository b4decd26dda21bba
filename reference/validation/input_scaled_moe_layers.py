"""Calls of Mixture-of-Experts layers whose routers weigh what experts are given."""

from typing import Any

from gaugeblock.reference import moe_states
from gaugeblock.reference.validation.moe_layers import require_layer


def llama4_moe(hidden_states: Any, state: Any, top_k: int, num_holders: int = 1) -> None:
    """Check the arguments of `input_scaled_moe_layers.llama4_moe`."""
    require_layer(hidden_states, state, moe_states.LLAMA4, top_k, num_holders)
