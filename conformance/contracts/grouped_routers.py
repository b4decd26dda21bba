"""Contracts of the routers that choose among groups of experts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import routers as of_routers
from gaugeblock.conformance.engine.contract import Contract, Input, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import routers


@row
def grouped_sigmoid_topk() -> Contract:
    """The row of `routers.grouped_sigmoid_topk`."""
    return Contract(
        name="routers.grouped_sigmoid_topk",
        summary="Each token goes to top_k experts of its best groups, chosen by sigmoid plus bias, weighted by sigmoid alone.",
        formula=(
            "s = sigmoid(router_logits); c = s + bias; a group's score is the sum of its two highest c; of the topk_groups best "
            "groups ids = topk(c); weights = s[ids] (/ (sum + 1e-20) if renormalize) * routed_scaling_factor"
        ),
        source="DeepSeek-V3 Technical Report (arXiv:2412.19437) section 2.1.2; the 1e-20 is of the public model's MoEGate",
        reference=routers.grouped_sigmoid_topk,
        inputs=(of_routers.LOGITS, BIAS),
        outputs=of_routers.OUTPUTS,
        options=("top_k", "num_groups", "topk_groups", "renormalize", "routed_scaling_factor"),
        batch="num_tokens",
        parameters=grouped_parameters,
        landmarks=(
            grouped_sizes(33, 64, 8, 8, 4, True, 2.5),  # DeepSeek-V3's groups, fewer experts
            grouped_sizes(17, 15, 4, 5, 3, False, 2.5),
            grouped_sizes(5, 6, 2, 6, 3, True, 1.0),  # groups of one expert
            grouped_sizes(3, 288, 8, 1, 1, True, 2.5),  # one group; ids above 255
            grouped_sizes(9, 256, 8, 8, 4, True, 2.5),  # DeepSeek-V3
        ),
        factors=GROUPED_FACTORS,
        build=grouped_point,
        traits=GROUPED_TRAITS,
        regimes=(
            *(with_bias(regime, few_biases if regime.name == "ties" else smooth_biases) for regime in of_routers.SIGMOID_REGIMES),
            with_bias(Regime("lattice", saturated, "worst element", differentiable=False), few_biases),
        ),
        flops=of_routers.flops,
        workloads=(
            Workload(
                "deepseek-v3/prefill-4096",
                grouped_sizes(4096, 256, 8, 8, 4, True, 2.5),
                "deepseek-ai/DeepSeek-V3 config.json",
            ),
            Workload("deepseek-v3/decode-64", grouped_sizes(64, 256, 8, 8, 4, True, 2.5), "deepseek-ai/DeepSeek-V3 config.json"),
        ),
        selection=Selection("topk_ids", _biased_scores, "top_k", group_scores=_biased_group_scores, group_count="topk_groups"),
        relabel=shuffled_groups,
        rejections=GROUPED_REJECTIONS,
        implementations=(triton(),),
    )


@row
def grouped_softmax_topk() -> Contract:
    """The row of `routers.grouped_softmax_topk`."""
    return Contract(
        name="routers.grouped_softmax_topk",
        summary="Each token goes to the top_k most probable experts of its best groups.",
        formula=(
            "p = softmax(router_logits); a group's score is its highest p; of the topk_groups best groups ids = topk(p); "
            "weights = p[ids] * routed_scaling_factor"
        ),
        source="DeepSeek-V2 (arXiv:2405.04434) section 2.1.2",
        reference=routers.grouped_softmax_topk,
        inputs=(of_routers.LOGITS,),
        outputs=of_routers.OUTPUTS,
        options=("top_k", "num_groups", "topk_groups", "routed_scaling_factor"),
        batch="num_tokens",
        landmarks=(
            softmax_sizes(33, 60, 6, 4, 2, 16.0),
            softmax_sizes(17, 15, 4, 5, 3, 1.0),
            softmax_sizes(5, 6, 2, 6, 3, 2.5),  # groups of one expert
            softmax_sizes(3, 288, 8, 1, 1, 2.5),  # one group; ids above 255
            softmax_sizes(17, 160, 6, 8, 3, 16.0),  # DeepSeek-V2
        ),
        factors=tuple(each for each in GROUPED_FACTORS if each.name != "renormalize"),
        build=grouped_point,
        traits=(
            Trait("each expert in turn", "router_logits", in_turn, fits=of_routers.each_expert),
            *of_routers.SOFTMAX_TRAITS[1:],
        ),
        regimes=(*of_routers.SOFTMAX_REGIMES, Regime("lattice", of_routers.lattice, "exact", differentiable=False)),
        flops=of_routers.flops,
        workloads=(
            Workload("deepseek-v2/prefill-4096", softmax_sizes(4096, 160, 6, 8, 3, 16.0), "deepseek-ai/DeepSeek-V2 config.json"),
        ),
        selection=Selection("topk_ids", _softmax_scores, "top_k", group_scores=_softmax_group_scores, group_count="topk_groups"),
        relabel=shuffled_groups,
        rejections=GROUPED_REJECTIONS,
        implementations=(triton(),),
    )


BIAS = Input("e_score_correction_bias", ("num_experts",), dtype="float32")


@st.composite
def grouped_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Groups of one expert, of odd sizes, all groups kept, and the published 8 groups."""
    groups, members = draw(st.sampled_from([1, 2, 3, 4, 5, 8])), draw(st.sampled_from([1, 2, 3, 4, 7, 16, 33]))
    kept = draw(st.integers(1, groups))
    return {
        "num_tokens": draw(st.sampled_from([1, 2, 3, 7, 16, 17, 33, 64])),
        "num_experts": groups * members,
        "top_k": draw(st.integers(1, min(kept * members, 9))),
        "num_groups": groups,
        "topk_groups": kept,
        "renormalize": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


def grouped_sizes(
    num_tokens: int, num_experts: int, top_k: int, num_groups: int, topk_groups: int, renormalize: bool, factor: float
) -> dict[str, Any]:
    """One point of the input space."""
    return of_routers.softmax_sizes(num_tokens, num_experts, top_k, renormalize) | {
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "routed_scaling_factor": factor,
    }


def softmax_sizes(
    num_tokens: int, num_experts: int, top_k: int, num_groups: int, topk_groups: int, factor: float
) -> dict[str, Any]:
    """One point of the input space of the softmax router."""
    groups = {"num_groups": num_groups, "topk_groups": topk_groups, "routed_scaling_factor": factor}
    return of_routers.sizes(num_tokens, num_experts, top_k) | groups


def in_turn(tensors: Tensors) -> Tensors:
    """The score of each expert in turn is high, all others are low."""
    logits, turn = tensors["router_logits"], of_routers.turns(tensors["router_logits"])
    high, low = torch.where(logits >= 3, logits, 3 + logits.abs()), torch.where(logits <= -3, logits, -3 - logits.abs())
    return {"router_logits": torch.where(turn, high, low)}


def _in_turn_among_groups(tensors: Tensors) -> Tensors:
    """The same without a bias, which could outweigh it."""
    bias = torch.zeros_like(tensors["e_score_correction_bias"])
    return in_turn(tensors) | {"e_score_correction_bias": bias}


GROUPED_TRAITS = (
    Trait("each expert in turn", "router_logits", _in_turn_among_groups, fits=of_routers.each_expert),
    Trait("negative", "router_logits", of_routers.negative),
)


GROUPED_FACTORS = (
    of_routers.TOKENS,
    kinds("num_groups", kind_of_count, 1, 2, 4, 8, 3, 5),
    edges("experts_of_a_group", 1, 2, 3, 33, of=lambda sizes: sizes["num_experts"] // sizes["num_groups"]),
    Factor("num_experts", kind_of_count),  # it follows from the groups
    edges("topk_groups", 1, 2, 3, option=True),
    of_routers.CHOSEN,
    either("renormalize", False, True),
    either("routed_scaling_factor", 1.0, 2.5),
)


def grouped_point(experts_of_a_group: int, num_groups: int, topk_groups: int, top_k: int, **others: Any) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    if topk_groups > num_groups or top_k > topk_groups * experts_of_a_group:
        return None
    experts = num_groups * experts_of_a_group
    return {"num_experts": experts, "top_k": top_k, "num_groups": num_groups, "topk_groups": topk_groups, **others}


def with_bias(regime: Regime, noise: Callable[[Draw, int], torch.Tensor]) -> Regime:
    """The same logits, and a correction bias: small, and shifted so that many biased scores are negative."""

    def make(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = regime.make(draw, parameters)
        return tensors | {"e_score_correction_bias": noise(draw, parameters["num_experts"]) - 0.5}

    return replace(regime, make=make)


def smooth_biases(draw: Draw, experts: int) -> torch.Tensor:
    return 0.3 * draw.normal(experts)


def few_biases(draw: Draw, experts: int) -> torch.Tensor:
    """One of three values, or the same for all: experts tie, and groups of experts too."""
    return 0.25 * (draw.integers(-1, 2, experts) * draw.integers(0, 2, 1)).to(torch.float64)


def saturated(draw: Draw, parameters: Parameters) -> Tensors:
    """Sigmoids of exactly one half: weights are powers of two where top_k is, and sums are exact."""
    return {"router_logits": torch.zeros(of_routers.logits_shape(parameters), dtype=torch.float64)}


def shuffled_groups(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Any order of the groups, and of the experts inside each."""
    groups = parameters["num_groups"]
    members = parameters["num_experts"] // groups
    order = torch.stack([draw.permutation(members) for _ in range(groups)])
    return (draw.permutation(groups)[:, None] * members + order).flatten()


def no_divisor(number: int) -> int:
    return number - 1 if number > 2 else number + 1


GROUPED_REJECTIONS = (
    *of_routers.SOFTMAX_REJECTIONS,
    Rejection(
        "groups that do not divide",
        "num_groups",
        lambda call: {"num_groups": no_divisor(call["router_logits"].shape[1])},
    ),
    Rejection("no groups", "num_groups", lambda call: {"num_groups": 0}),
    Rejection("more groups kept than there are", "topk_groups", lambda call: {"topk_groups": call["num_groups"] + 1}),
    Rejection(
        "top_k above what the kept groups hold",
        "top_k",
        lambda call: {"topk_groups": 1, "top_k": call["router_logits"].shape[1] // call["num_groups"] + 1},
    ),
)


def _biased_scores(router_logits: torch.Tensor, e_score_correction_bias: torch.Tensor, **_: Any) -> torch.Tensor:
    return routers.sigmoid_choice_scores(router_logits, e_score_correction_bias)


def _biased_group_scores(
    router_logits: torch.Tensor, e_score_correction_bias: torch.Tensor, *, num_groups: int, **_: Any
) -> torch.Tensor:
    return routers.best_of_groups(_biased_scores(router_logits, e_score_correction_bias), num_groups, 2)


def _softmax_scores(router_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.softmax(router_logits, -1)


def _softmax_group_scores(router_logits: torch.Tensor, *, num_groups: int, **_: Any) -> torch.Tensor:
    return routers.best_of_groups(_softmax_scores(router_logits), num_groups, 1)
