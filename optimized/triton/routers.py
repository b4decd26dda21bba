"""Routers, fused: one kernel forward and one backward, of `routing.py`, for every way to score, choose and weigh.

Arguments, results and errors are those of the references. Logits may have any strides, and lie where Triton runs (a ValueError
otherwise); weights are differentiable once; ids are int64, NaN highest, of equals the lower id.
"""

import torch

from gaugeblock.optimized.triton.routing import route
from gaugeblock.reference import validation


def softmax_topk(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.softmax_topk`."""
    validation.softmax_topk(router_logits, top_k)
    return route(router_logits, top_k=top_k, scores="softmax", divisor="sum" if renormalize else "")


def topk_softmax(router_logits: torch.Tensor, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.topk_softmax`."""
    validation.topk_softmax(router_logits, top_k)
    return route(router_logits, top_k=top_k, scores="softmax", divisor="sum")


def sigmoid_topk(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.sigmoid_topk`; of sigmoids that round to the same the higher logit is chosen."""
    validation.sigmoid_topk(router_logits, top_k)
    return route(router_logits, top_k=top_k, scores="sigmoid", divisor="sum + epsilon" if renormalize else "")


def sigmoid_input_scaling(router_logits: torch.Tensor, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.sigmoid_input_scaling`."""
    validation.sigmoid_input_scaling(router_logits, top_k)
    return route(router_logits, top_k=top_k, scores="sigmoid")


def grouped_softmax_topk(
    router_logits: torch.Tensor, *, top_k: int, num_groups: int, topk_groups: int, routed_scaling_factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.grouped_softmax_topk`."""
    validation.grouped_softmax_topk(router_logits, top_k, num_groups, topk_groups, routed_scaling_factor)
    return route(
        router_logits,
        top_k=top_k,
        scores="softmax",
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_best=1,
        routed_scaling_factor=routed_scaling_factor,
    )


def grouped_sigmoid_topk(
    router_logits: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.grouped_sigmoid_topk`; the bias may have any stride."""
    validation.grouped_sigmoid_topk(router_logits, e_score_correction_bias, top_k, num_groups, topk_groups, routed_scaling_factor)
    return route(
        router_logits,
        e_score_correction_bias,
        top_k=top_k,
        scores="sigmoid",
        divisor="sum + epsilon" if renormalize else "",
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_best=2,
        routed_scaling_factor=routed_scaling_factor,
    )


def biased_softmax_topk(
    router_logits: torch.Tensor, e_score_correction_bias: torch.Tensor, *, top_k: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.biased_softmax_topk`; the bias may have any stride."""
    validation.biased_softmax_topk(router_logits, e_score_correction_bias, top_k, norm_min)
    return route(
        router_logits,
        e_score_correction_bias,
        top_k=top_k,
        scores="softmax",
        divisor="sum, or the least",
        divisor_min=norm_min,
    )


def zero_expert_topk(
    router_logits: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    *,
    top_k: int,
    num_zero_experts: int,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.zero_expert_topk`; the bias may have any stride.

    The weights of the identities are added up by torch: they are few beside the logits.
    """
    validation.zero_expert_topk(router_logits, e_score_correction_bias, top_k, num_zero_experts, routed_scaling_factor)
    topk_weights, topk_ids = route(
        router_logits, e_score_correction_bias, top_k=top_k, scores="softmax", routed_scaling_factor=routed_scaling_factor
    )
    is_identity = topk_ids >= router_logits.shape[1] - num_zero_experts
    return topk_weights, topk_ids, torch.where(is_identity, topk_weights, 0).sum(dim=-1)
