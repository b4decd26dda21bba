"""Calls of Mixture-of-Experts layers."""

from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    dtype_name,
    require_between,
    require_dtype,
    require_entry_names,
    require_same_device,
    require_shape,
)


def mixtral_moe(hidden_states: Any, state: Any, top_k: int) -> None:
    """Check the arguments of `moe_layers.mixtral_moe`."""
    require_dtype("hidden_states", hidden_states, FLOATING)
    require_shape("hidden_states", hidden_states, num_tokens=None, hidden_size=None)
    require_entry_names("state", state, ("gate.weight", "experts.gate_up_proj", "experts.down_proj"))
    entries = {f"state[{name!r}]": array for name, array in state.items()}
    gate, w13, w2 = "state['gate.weight']", "state['experts.gate_up_proj']", "state['experts.down_proj']"
    for name, array in entries.items():
        require_dtype(name, array, (dtype_name(hidden_states),))
        require_same_device(name, array, "hidden_states", hidden_states)

    hidden_size = hidden_states.shape[1]
    require_shape(gate, entries[gate], num_experts=None, hidden_size=hidden_size)
    num_experts = entries[gate].shape[0]
    require_shape(w2, entries[w2], num_experts=num_experts, hidden_size=hidden_size, intermediate_size=None)
    require_shape(w13, entries[w13], num_experts=num_experts, gate_and_up=2 * entries[w2].shape[2], hidden_size=hidden_size)
    require_between("top_k", top_k, 1, num_experts, "num_experts=")
