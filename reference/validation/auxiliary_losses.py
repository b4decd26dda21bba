"""Calls of auxiliary losses."""

import sys
from typing import Any

from gaugeblock.reference.configs import ScoreFunction
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    require_between,
    require_dtype,
    require_number,
    require_one_of,
    require_same_device,
    require_shape,
)


def load_balancing_loss(router_logits: Any, topk_ids: Any, attention_mask: Any) -> None:
    """Check the arguments of `auxiliary_losses.load_balancing_loss`; the ids' values are left to `expert_ids_in_range`."""
    router_z_loss(router_logits, attention_mask)
    _require_ids(topk_ids, router_logits, num_tokens=router_logits.shape[0])


def sequence_balance_loss(router_logits: Any, topk_ids: Any, attention_mask: Any, scores: Any) -> None:
    """Check the arguments of `auxiliary_losses.sequence_balance_loss`; the ids' values are left to `expert_ids_in_range`."""
    _require_logits(router_logits, attention_mask, batch_size=None, sequence_length=None)
    _require_ids(topk_ids, router_logits, batch_size=router_logits.shape[0], sequence_length=router_logits.shape[1])
    require_one_of("scores", scores, ScoreFunction)


def router_z_loss(router_logits: Any, attention_mask: Any) -> None:
    """Check the arguments of `auxiliary_losses.router_z_loss`."""
    _require_logits(router_logits, attention_mask, num_tokens=None)


def routing_entropy(router_logits: Any, attention_mask: Any) -> None:
    """Check the arguments of `auxiliary_losses.routing_entropy`."""
    _require_logits(router_logits, attention_mask, num_tokens=None)


def expert_load(topk_ids: Any, attention_mask: Any, num_experts: Any) -> None:
    """Check the arguments of `auxiliary_losses.expert_load`; the ids' values are left to `expert_ids_in_range`."""
    require_dtype("attention_mask", attention_mask, ("bool",))
    require_shape("attention_mask", attention_mask, num_tokens=None)
    _require_ids(topk_ids, attention_mask, "attention_mask", num_tokens=attention_mask.shape[0])
    require_between("num_experts", num_experts, 1, sys.maxsize)


def correction_bias_update(e_score_correction_bias: Any, tokens_per_expert: Any, update_rate: Any) -> None:
    """Check the arguments of `auxiliary_losses.correction_bias_update`."""
    require_dtype("e_score_correction_bias", e_score_correction_bias, ("float32", "float64"))
    require_shape("e_score_correction_bias", e_score_correction_bias, num_experts=None)
    if e_score_correction_bias.shape[0] == 0:
        raise ValueError(f"e_score_correction_bias must hold at least one expert, got {tuple(e_score_correction_bias.shape)}")
    require_dtype("tokens_per_expert", tokens_per_expert, INTEGER)
    require_shape("tokens_per_expert", tokens_per_expert, num_experts=e_score_correction_bias.shape[0])
    require_same_device("tokens_per_expert", tokens_per_expert, "e_score_correction_bias", e_score_correction_bias)
    require_number("update_rate", update_rate)
    if update_rate < 0:
        raise ValueError(f"update_rate must not be negative, got {update_rate}")


def _require_logits(router_logits: Any, attention_mask: Any, **tokens: int | None) -> None:
    """Check logits over one expert at least, and their mask."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, **tokens, num_experts=None)
    if router_logits.shape[-1] == 0:
        raise ValueError(f"router_logits must hold at least one expert, got {tuple(router_logits.shape)}")
    require_dtype("attention_mask", attention_mask, ("bool",))
    require_shape("attention_mask", attention_mask, **dict(zip(tokens, router_logits.shape, strict=False)))
    require_same_device("attention_mask", attention_mask, "router_logits", router_logits)


def _require_ids(topk_ids: Any, other: Any, other_name: str = "router_logits", **tokens: int) -> None:
    """Check ids, one at least for each token."""
    require_dtype("topk_ids", topk_ids, INTEGER)
    require_shape("topk_ids", topk_ids, **tokens, top_k=None)
    if topk_ids.shape[-1] == 0:
        raise ValueError(f"topk_ids must hold at least one expert per token, got {tuple(topk_ids.shape)}")
    require_same_device("topk_ids", topk_ids, other_name, other)
