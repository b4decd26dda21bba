"""Calls of Mixture-of-Experts layers and their auxiliary losses."""

from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
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


def load_balancing_loss(router_logits: Any, topk_ids: Any, attention_mask: Any) -> None:
    """Check the arguments of `moe_layers.load_balancing_loss`; the ids' values are left to `expert_ids_in_range`."""
    router_z_loss(router_logits, attention_mask)
    require_dtype("topk_ids", topk_ids, INTEGER)
    require_shape("topk_ids", topk_ids, num_tokens=router_logits.shape[0], top_k=None)
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids must hold at least one expert per token, got {tuple(topk_ids.shape)}")
    require_same_device("topk_ids", topk_ids, "router_logits", router_logits)


def router_z_loss(router_logits: Any, attention_mask: Any) -> None:
    """Check the arguments of `moe_layers.router_z_loss`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    num_tokens, num_experts = router_logits.shape
    if num_experts == 0:
        raise ValueError(f"router_logits must hold at least one expert, got {tuple(router_logits.shape)}")
    require_dtype("attention_mask", attention_mask, ("bool",))
    require_shape("attention_mask", attention_mask, num_tokens=num_tokens)
    require_same_device("attention_mask", attention_mask, "router_logits", router_logits)
