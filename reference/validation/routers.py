"""Calls of routers."""

from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    require_between,
    require_dtype,
    require_number,
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


topk_softmax = sigmoid_topk = sigmoid_input_scaling = softmax_topk  # which has the same array and top_k


def require_groups(num_experts: int, top_k: int, num_groups: int, topk_groups: int) -> None:
    """Check how many groups there are, how many are kept, and how many experts are chosen from those."""
    require_between("num_groups", num_groups, 1, num_experts, "num_experts=")
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide num_experts={num_experts}, got {num_groups}")
    require_between("topk_groups", topk_groups, 1, num_groups, "num_groups=")
    kept_experts = topk_groups * num_experts // num_groups
    require_between("top_k", top_k, 1, kept_experts, "experts in the kept groups=")


def grouped_softmax_topk(router_logits: Any, top_k: int, num_groups: int, topk_groups: int, routed_scaling_factor: float) -> None:
    """Check the arguments of `routers.grouped_softmax_topk`."""
    softmax_topk(router_logits, top_k)
    require_groups(router_logits.shape[1], top_k, num_groups, topk_groups)
    require_number("routed_scaling_factor", routed_scaling_factor)


def grouped_sigmoid_topk(
    router_logits: Any, e_score_correction_bias: Any, top_k: int, num_groups: int, topk_groups: int, routed_scaling_factor: float
) -> None:
    """Check the arguments of `routers.grouped_sigmoid_topk`."""
    _biased(router_logits, e_score_correction_bias, top_k)
    require_groups(router_logits.shape[1], top_k, num_groups, topk_groups)
    require_number("routed_scaling_factor", routed_scaling_factor)


def biased_softmax_topk(router_logits: Any, e_score_correction_bias: Any, top_k: int, norm_min: float) -> None:
    """Check the arguments of `routers.biased_softmax_topk`."""
    _biased(router_logits, e_score_correction_bias, top_k)
    require_positive("norm_min", norm_min)


def zero_expert_topk(
    router_logits: Any, e_score_correction_bias: Any, top_k: int, num_zero_experts: int, routed_scaling_factor: float
) -> None:
    """Check the arguments of `routers.zero_expert_topk`."""
    _biased(router_logits, e_score_correction_bias, top_k)
    require_between("num_zero_experts", num_zero_experts, 0, router_logits.shape[1], "num_experts=")
    require_number("routed_scaling_factor", routed_scaling_factor)


def _biased(router_logits: Any, e_score_correction_bias: Any, top_k: int) -> None:
    """Check logits, how many experts are chosen, and the bias by which."""
    softmax_topk(router_logits, top_k)
    require_dtype("e_score_correction_bias", e_score_correction_bias, FLOATING)
    require_shape("e_score_correction_bias", e_score_correction_bias, num_experts=router_logits.shape[1])
    require_same_device("e_score_correction_bias", e_score_correction_bias, "router_logits", router_logits)


def sparsemixer(router_logits: Any, jitter_eps: float) -> None:
    """Check the arguments of `routers.sparsemixer`."""
    require_dtype("router_logits", router_logits, FLOATING)
    require_shape("router_logits", router_logits, num_tokens=None, num_experts=None)
    if router_logits.shape[1] < 2:
        raise ValueError(f"router_logits must hold at least two experts, got {tuple(router_logits.shape)}")
    require_positive("jitter_eps", jitter_eps)


def hash_router(token_ids: Any, table: Any) -> None:
    """Check the arguments of `routers.hash_router`; the ids' values are left to `token_ids_in_range`."""
    require_dtype("token_ids", token_ids, INTEGER)
    require_shape("token_ids", token_ids, num_tokens=None)
    require_dtype("table", table, INTEGER)
    require_shape("table", table, vocabulary_size=None)
    require_same_device("table", table, "token_ids", token_ids)


def token_ids_in_range(token_ids: Any, vocabulary_size: int) -> None:
    """Check that every token has an entry in the table; reads values, where they can be read."""
    require_values("token_ids", token_ids, vocabulary_size - 1)
