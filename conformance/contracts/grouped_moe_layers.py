"""Contracts of the MoE layers that choose among groups of experts, with shared experts beside them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gaugeblock.conformance.contracts import grouped_routers as of_groups
from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.contracts import routed_layers as of_layers
from gaugeblock.conformance.contracts.routed_layers import GATE
from gaugeblock.conformance.engine.contract import Contract, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import compiled, distributed, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.shardings import EvenMultiple, Sharding
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference import moe_states
from gaugeblock.reference.moe_states import CORRECTION_BIAS
from gaugeblock.reference.torch import grouped_moe_layers, routers


@row
def deepseek_v2_moe() -> Contract:
    """The row of `grouped_moe_layers.deepseek_v2_moe`."""
    return Contract(
        name="grouped_moe_layers.deepseek_v2_moe",
        summary="Each token passes the most probable experts of its best groups, and the shared experts.",
        formula=(
            "router_logits = hidden_states @ gate.weight.T; topk_weights, topk_ids = grouped_softmax_topk(router_logits), "
            "renormalized or not, * routed_scaling_factor; hidden_states_out = fused_swiglu(hidden_states, experts, "
            "topk_weights, topk_ids) + shared_swiglu(hidden_states, shared_experts)"
        ),
        source="DeepSeek-V2 (arXiv:2405.04434) section 2.1; names of parameters as in transformers' DeepseekV2Moe",
        reference=grouped_moe_layers.deepseek_v2_moe,
        inputs=of_layers.inputs(moe_states.DEEPSEEK_V2),
        outputs=of_layers.OUTPUTS,
        options=OPTIONS,
        batch="num_tokens",
        landmarks=LANDMARKS,
        factors=FACTORS,
        build=point,
        traits=(of_layers.gate_in_turn(),),
        regimes=of_layers.regimes(ENTRIES, lattice=lattice, more=of_layers.and_shared),
        cases=0.25,
        flops=of_layers.flops,
        moved=of_layers.moved,
        workloads=(
            *workloads("deepseek-v2", (5120, 1536, 160, 6), 2 * 1536, (8, 3, False, 16.0), DEEPSEEK_V2),
            *workloads("deepseek-v2-lite", (2048, 1408, 64, 6), 2 * 1408, (1, 1, False, 1.0), DEEPSEEK_V2_LITE),
            Workload("two-cores/prefill-2048", {**TWO_CORES, **options(8, 3, False, 16.0)}, "a size for a CPU"),
        ),
        selection=Selection("topk_ids", _probabilities, "top_k", group_scores=_most_probable, group_count="topk_groups"),
        relabel=of_groups.shuffled_groups,
        shardings=EXPERT_PARALLEL,
        rejections=REJECTIONS,
        implementations=(
            triton(),
            compiled("torch-grouped"),
            distributed("expert-parallel", "moe_layers:deepseek_v2_moe", **of_experts.ON_RANKS),
        ),
    )


@row
def deepseek_v3_moe() -> Contract:
    """The row of `grouped_moe_layers.deepseek_v3_moe`."""
    return Contract(
        name="grouped_moe_layers.deepseek_v3_moe",
        summary="Each token passes experts of its best groups, chosen by sigmoid plus bias, and the shared experts.",
        formula=(
            "router_logits = hidden_states @ gate.weight.T; topk_weights, topk_ids = grouped_sigmoid_topk(router_logits, "
            "gate.e_score_correction_bias); hidden_states_out = fused_swiglu(hidden_states, experts, topk_weights, topk_ids) + "
            "shared_swiglu(hidden_states, shared_experts)"
        ),
        source=(
            "DeepSeek-V3 Technical Report (arXiv:2412.19437) section 2.1.2; names of parameters as in transformers' DeepseekV3MoE"
        ),
        reference=grouped_moe_layers.deepseek_v3_moe,
        inputs=of_layers.inputs(moe_states.DEEPSEEK_V3),
        outputs=of_layers.OUTPUTS,
        options=OPTIONS,
        batch="num_tokens",
        landmarks=LANDMARKS,
        factors=FACTORS,
        build=point,
        traits=(Trait("each expert in turn", "choice", _gate_in_turn, fits=of_layers.gate_in_turn().fits),),
        regimes=tuple(map(with_bias, of_layers.regimes(ENTRIES, lattice=lattice, more=of_layers.and_shared))),
        cases=0.25,
        flops=of_layers.flops,
        moved=lambda sizes, itemsize: of_layers.moved(sizes, itemsize) + 4 * sizes["num_experts"],
        workloads=(
            *workloads("deepseek-v3", (7168, 2048, 256, 8), 2048, (8, 4, True, 2.5), "deepseek-ai/DeepSeek-V3 config.json"),
            *workloads("kimi-k2", (7168, 2048, 384, 8), 2048, (1, 1, True, 2.827), "moonshotai/Kimi-K2-Base config.json"),
            *workloads("glm-4.5", (5120, 1536, 160, 8), 1536, (1, 1, True, 2.5), "zai-org/GLM-4.5 config.json"),
            *workloads("llada2-mini", (2048, 512, 256, 8), 512, (8, 4, True, 2.5), LLADA2_MINI),
            Workload("two-cores/prefill-2048", {**TWO_CORES, **options(8, 4, True, 2.5)}, "a size for a CPU"),
        ),
        selection=Selection("topk_ids", _biased, "top_k", group_scores=_best_two, group_count="topk_groups"),
        relabel=of_groups.shuffled_groups,
        shardings=EXPERT_PARALLEL,
        rejections=(
            *REJECTIONS,
            Rejection("a bias for fewer experts", CORRECTION_BIAS, changed(f"state/{CORRECTION_BIAS}", lambda each: each[:-1])),
            Rejection("a bias of integers", CORRECTION_BIAS, changed(f"state/{CORRECTION_BIAS}", torch.Tensor.int)),
        ),
        implementations=(
            triton(),
            compiled("torch-grouped"),
            distributed("expert-parallel", "moe_layers:deepseek_v3_moe", **of_experts.ON_RANKS),
        ),
    )


EXPERT_PARALLEL: dict[str, Sharding] = {"expert_parallel": {"num_tokens": "uneven", "num_experts": EvenMultiple("num_groups")}}
LLADA2_MINI = "inclusionAI/LLaDA2.0-mini, 256 experts, top 8 of 4 of 8 groups; widths that fit its 16 billion parameters"
DEEPSEEK_V2 = "deepseek-ai/DeepSeek-V2 config.json"
DEEPSEEK_V2_LITE = "deepseek-ai/DeepSeek-V2-Lite config.json"
OPTIONS = ("top_k", "num_groups", "topk_groups", "renormalize", "routed_scaling_factor")
SHARED_DOWN = "shared_experts.down_proj.weight"
ENTRIES: of_layers.Entries = {**of_layers.ROUTED, **of_layers.shared_entries("shared_experts")}


def options(num_groups: int, topk_groups: int, renormalize: bool, routed_scaling_factor: float) -> dict[str, Any]:
    """What a point has beside sizes and top_k."""
    return {
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "renormalize": renormalize,
        "routed_scaling_factor": routed_scaling_factor,
    }


def workloads(
    model: str, shape: tuple[int, int, int, int], shared: int, router: tuple[int, int, bool, float], source: str
) -> tuple[Workload, ...]:
    """Those of `of_layers.workloads`, with the width of the shared experts and the options of the router."""
    return of_layers.workloads(model, shape, source, shared_intermediate_size=shared, **options(*router))


TWO_CORES = {**of_experts.sizes(2048, 512, 256, 64, 8), "shared_intermediate_size": 512}
LANDMARKS = (
    {**of_experts.sizes(33, 40, 24, 6, 2), "shared_intermediate_size": 28, **options(3, 2, True, 2.5)},  # tails everywhere
    {**of_experts.sizes(70, 16, 32, 3, 2), "shared_intermediate_size": 17, **options(1, 1, False, 1.0)},  # several tiles of rows
    {**of_experts.sizes(5, 40, 24, 32, 4), "shared_intermediate_size": 48, **options(8, 4, True, 2.5)},  # most without tokens
    {**of_experts.sizes(17, 24, 16, 6, 3), "shared_intermediate_size": 8, **options(6, 4, False, 2.5)},  # groups of one expert
    {**of_experts.sizes(17, 16, 16, 4, 1), "shared_intermediate_size": 16, **options(2, 1, True, 1.0)},  # one expert per token
)
FACTORS = (
    *(each for each in of_experts.FACTORS if each.name != "num_experts"),
    kinds("num_groups", kind_of_count, 1, 2, 4, 3),
    edges("experts_of_a_group", 1, 2, 3, of=lambda sizes: sizes["num_experts"] // sizes["num_groups"]),
    Factor("num_experts", kind_of_count),  # it follows from the groups
    edges("topk_groups", 1, 2, 3, option=True),
    of_layers.SHARED_WIDTH,
    either("renormalize", False, True),
    either("routed_scaling_factor", 1.0, 2.5),
)


def point(
    *, experts_of_a_group: int, num_groups: int, topk_groups: int, top_k: int, shared_intermediate_size: int, **others: Any
) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    chosen = of_groups.grouped_point(experts_of_a_group, num_groups, topk_groups, top_k)
    if chosen is None:
        return None
    widths = {"two_intermediate_sizes": 2 * others["intermediate_size"], "shared_intermediate_size": shared_intermediate_size}
    return {**others, **chosen, **widths}


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits of 64 and -256, whose probabilities and sigmoids are 0, a half or less, or 1: as `of_layers.softmax_lattice`.

    The high ones lie in as few groups as hold them, all of which are kept.
    """

    def high() -> torch.Tensor:
        order = of_groups.shuffled_groups(draw, parameters)
        return order[: 2 ** (parameters["top_k"].bit_length() - 1)]

    return of_layers.sums_exact(draw, parameters, torch.stack([high(), high()]), (64.0, -256.0))


def with_bias(regime: Regime) -> Regime:
    """The same with a correction bias, of which most scores are negative; where experts are to tie, it has few values."""
    biases: dict[str, Callable[[Draw, int], torch.Tensor]] = {"ties": of_groups.few_biases, "lattice": _slight_biases}

    def make(draw: Draw, parameters: Parameters) -> Tensors:
        bias = biases.get(regime.name, of_groups.smooth_biases)(draw, parameters["num_experts"]) - 0.5
        return {**regime.make(draw, parameters), f"state/{CORRECTION_BIAS}": bias}

    return replace(regime, make=make)


def _slight_biases(draw: Draw, experts: int) -> torch.Tensor:
    """So small that the sum of a group's two best tells whether one of them is 1."""
    return of_groups.few_biases(draw, experts) / 2


def _gate_in_turn(tensors: Tensors) -> Tensors:
    """Without a bias, and where sigmoids differ."""
    change = of_layers.gate_in_turn().change
    assert change is not None
    tensors = dict(change(tensors)) | {f"state/{CORRECTION_BIAS}": 0 * tensors[f"state/{CORRECTION_BIAS}"]}
    return tensors | {f"state/{GATE}": tensors[f"state/{GATE}"] / 4}


REJECTIONS = (
    *of_layers.rejections(),
    Rejection("a shared expert of two widths", SHARED_DOWN, changed(f"state/{SHARED_DOWN}", lambda each: each[:, :-1])),
    Rejection(
        "groups that do not divide", "num_groups", lambda call: {"num_groups": of_groups.no_divisor(len(call[f"state/{GATE}"]))}
    ),
    Rejection("no groups", "num_groups", lambda call: {"num_groups": 0}),
    Rejection("more groups kept than there are", "topk_groups", lambda call: {"topk_groups": call["num_groups"] + 1}),
    Rejection(
        "top_k above what the kept groups hold",
        "top_k",
        lambda call: {"topk_groups": 1, "top_k": len(call[f"state/{GATE}"]) // call["num_groups"] + 1},
    ),
)


def _logits(hidden_states: torch.Tensor, state: Tensors) -> torch.Tensor:
    return hidden_states @ state[GATE].mT


def _probabilities(hidden_states: torch.Tensor, state: Tensors, **_: Any) -> torch.Tensor:
    return torch.softmax(_logits(hidden_states, state), -1)


def _most_probable(hidden_states: torch.Tensor, state: Tensors, *, num_groups: int, **_: Any) -> torch.Tensor:
    return routers.best_of_groups(_probabilities(hidden_states, state), num_groups, 1)


def _biased(hidden_states: torch.Tensor, state: Tensors, **_: Any) -> torch.Tensor:
    return routers.sigmoid_choice_scores(_logits(hidden_states, state), state[CORRECTION_BIAS])


def _best_two(hidden_states: torch.Tensor, state: Tensors, *, num_groups: int, **_: Any) -> torch.Tensor:
    return routers.best_of_groups(_biased(hidden_states, state), num_groups, 2)
