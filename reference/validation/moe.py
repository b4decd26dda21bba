"""Calls of routers, experts and Mixture-of-Experts layers."""

from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    dtype_name,
    require_between,
    require_dtype,
    require_entry_names,
    require_positive,
    require_same_device,
    require_shape,
    require_values,
)


def softmax_topk(router_logits: Any, top_k: int) -> None:
    """Check the arguments of `routers.softmax_topk`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    require_between("top_k", top_k, 1, router_logits.shape[1], "num_experts=")


def grouped_sigmoid_topk(router_logits: Any, e_score_correction_bias: Any, top_k: int, num_groups: int, topk_groups: int) -> None:
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


def switch_top1(router_logits: Any, capacity_factor: float) -> None:
    """Check the arguments of `routers.switch_top1`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    if router_logits.shape[1] == 0:
        raise ValueError(f"router_logits must hold at least one expert, got {tuple(router_logits.shape)}")
    require_positive("capacity_factor", capacity_factor)


def fused_swiglu(hidden_states: Any, w13: Any, w2: Any, topk_weights: Any, topk_ids: Any) -> None:
    """Check the arguments of `experts.fused_swiglu`; the ids' values are left to `expert_ids_in_range`."""
    require_dtype("hidden_states", hidden_states, FLOATING)
    require_dtype("w13", w13, (dtype_name(hidden_states),))
    require_dtype("w2", w2, (dtype_name(hidden_states),))
    require_dtype("topk_weights", topk_weights, FLOATING)
    require_dtype("topk_ids", topk_ids, INTEGER)

    require_shape("hidden_states", hidden_states, num_tokens=None, hidden_size=None)
    num_tokens, hidden_size = hidden_states.shape
    require_shape("w13", w13, num_experts=None, twice_intermediate_size=None, hidden_size=hidden_size)
    num_experts, gate_and_up = w13.shape[:2]
    if num_experts == 0:
        raise ValueError(f"w13 must hold at least one expert, got {tuple(w13.shape)}")
    if gate_and_up % 2:
        raise ValueError(f"w13 must hold as many gate rows as up rows, got {gate_and_up} rows")
    require_shape("w2", w2, num_experts=num_experts, hidden_size=hidden_size, intermediate_size=gate_and_up // 2)
    require_shape("topk_ids", topk_ids, num_tokens=num_tokens, top_k=None)
    require_shape("topk_weights", topk_weights, num_tokens=num_tokens, top_k=topk_ids.shape[1])

    for name, array in (("w13", w13), ("w2", w2), ("topk_weights", topk_weights), ("topk_ids", topk_ids)):
        require_same_device(name, array, "hidden_states", hidden_states)


def expert_ids_in_range(topk_ids: Any, num_experts: int) -> None:
    """Check that every id names an expert, unless it cannot be read: a JAX tracer, a CUDA graph's capture."""
    require_values("topk_ids", topk_ids, num_experts - 1)


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
