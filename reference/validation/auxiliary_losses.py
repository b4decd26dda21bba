"""Calls of auxiliary losses."""

from typing import Any

from gaugeblock.reference.validation.arrays import FLOATING, INTEGER, require_dtype, require_same_device, require_shape


def load_balancing_loss(router_logits: Any, topk_ids: Any, attention_mask: Any) -> None:
    """Check the arguments of `auxiliary_losses.load_balancing_loss`; the ids' values are left to `expert_ids_in_range`."""
    router_z_loss(router_logits, attention_mask)
    require_dtype("topk_ids", topk_ids, INTEGER)
    require_shape("topk_ids", topk_ids, num_tokens=router_logits.shape[0], top_k=None)
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids must hold at least one expert per token, got {tuple(topk_ids.shape)}")
    require_same_device("topk_ids", topk_ids, "router_logits", router_logits)


def router_z_loss(router_logits: Any, attention_mask: Any) -> None:
    """Check the arguments of `auxiliary_losses.router_z_loss`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    num_tokens, num_experts = router_logits.shape
    if num_experts == 0:
        raise ValueError(f"router_logits must hold at least one expert, got {tuple(router_logits.shape)}")
    require_dtype("attention_mask", attention_mask, ("bool",))
    require_shape("attention_mask", attention_mask, num_tokens=num_tokens)
    require_same_device("attention_mask", attention_mask, "router_logits", router_logits)
