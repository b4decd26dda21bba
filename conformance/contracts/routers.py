"""Contracts of the routers."""

import math
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import routers


@row
def softmax_topk() -> Contract:
    """The row of `routers.softmax_topk`."""
    return Contract(
        name="routers.softmax_topk",
        summary="Each token goes to the top_k experts of highest softmax probability.",
        formula="p = softmax(router_logits); ids = topk(p); weights = p[ids], divided by their sum if renormalize",
        source="Mixtral (arXiv:2401.04088) section 2.1, renormalized; OLMoE (arXiv:2409.02060) section 2, not renormalized",
        reference=routers.softmax_topk,
        inputs=(LOGITS,),
        outputs=OUTPUTS,
        options=("top_k", "renormalize"),
        batch="num_tokens",
        parameters=softmax_parameters,
        landmarks=(
            softmax_sizes(64, 60, 4, True),  # Qwen1.5-MoE's 60 experts: not a power of two
            softmax_sizes(33, 8, 2, False),
            softmax_sizes(17, 300, 8, True),  # ids above 255
            softmax_sizes(5, 3, 3, False),  # every expert chosen
            softmax_sizes(33, 8, 2, True),  # Mixtral
            softmax_sizes(17, 128, 8, True),  # Qwen3
        ),
        factors=SOFTMAX_FACTORS,
        build=softmax_point,
        traits=SOFTMAX_TRAITS,
        regimes=(*SOFTMAX_REGIMES, Regime("lattice", lattice, "exact", differentiable=False)),
        flops=flops,
        workloads=(
            Workload("mixtral-8x7b/prefill-4096", softmax_sizes(4096, 8, 2, True), "mistralai/Mixtral-8x7B-v0.1 config.json"),
            Workload("qwen3-30b-a3b/prefill-4096", softmax_sizes(4096, 128, 8, True), "Qwen/Qwen3-30B-A3B config.json"),
            Workload("olmoe-1b-7b/prefill-4096", softmax_sizes(4096, 64, 8, False), "allenai/OLMoE-1B-7B-0924 config.json"),
            Workload("qwen3-30b-a3b/decode-64", softmax_sizes(64, 128, 8, True), "Qwen/Qwen3-30B-A3B config.json"),
        ),
        formulas=(_softmax_of_chosen,),
        selection=Selection("topk_ids", _softmax_scores, "top_k"),
        relabel=shuffled_experts,
        rejections=SOFTMAX_REJECTIONS,
        implementations=(triton(),),
    )


@row
def topk_softmax() -> Contract:
    """The row of `routers.topk_softmax`."""
    return Contract(
        name="routers.topk_softmax",
        summary="Each token goes to the experts of its top_k highest logits, weighted by the softmax of those.",
        formula="ids = topk(router_logits); weights = softmax(router_logits[ids])",
        source="gpt-oss (GptOssTopKRouter of transformers); Granite MoE",
        reference=routers.topk_softmax,
        inputs=(LOGITS,),
        outputs=OUTPUTS,
        options=("top_k",),
        batch="num_tokens",
        landmarks=(
            sizes(64, 60, 4),
            sizes(17, 300, 8),  # ids above 255
            sizes(5, 3, 3),  # every expert chosen
            sizes(33, 128, 4),  # gpt-oss-120b
            sizes(17, 40, 8),  # Granite 3
        ),
        factors=FACTORS,
        build=point,
        traits=SOFTMAX_TRAITS,
        regimes=(*SOFTMAX_REGIMES, Regime("lattice", lattice, "exact", differentiable=False)),
        flops=flops,
        workloads=(
            Workload("gpt-oss-120b/prefill-4096", sizes(4096, 128, 4), "openai/gpt-oss-120b config.json"),
            Workload("gpt-oss-20b/prefill-4096", sizes(4096, 32, 4), "openai/gpt-oss-20b config.json"),
            Workload("granite-3-3b/prefill-4096", sizes(4096, 40, 8), "ibm-granite/granite-3.0-3b-a800m-base config.json"),
        ),
        formulas=(_softmax_of_all_renormalized,),
        selection=Selection("topk_ids", _logits, "top_k"),
        relabel=shuffled_experts,
        rejections=SOFTMAX_REJECTIONS,
        implementations=(triton(),),
    )


@row
def sigmoid_topk() -> Contract:
    """The row of `routers.sigmoid_topk`."""
    return Contract(
        name="routers.sigmoid_topk",
        summary="Each token goes to the experts of its top_k highest sigmoids, weighted by those.",
        formula="s = sigmoid(router_logits); ids = topk(s); weights = s[ids], divided by their sum + 1e-20 if renormalize",
        source="DeepSeek-V3 Technical Report (arXiv:2412.19437) equations 13 to 15, without the bias",
        reference=routers.sigmoid_topk,
        inputs=(LOGITS,),
        outputs=OUTPUTS,
        options=("top_k", "renormalize"),
        batch="num_tokens",
        parameters=softmax_parameters,
        landmarks=(
            softmax_sizes(64, 60, 4, True),
            softmax_sizes(33, 8, 2, False),
            softmax_sizes(17, 300, 8, True),
            softmax_sizes(5, 3, 3, False),
            softmax_sizes(17, 256, 8, True),  # MiniMax-M2
        ),
        factors=SOFTMAX_FACTORS,
        build=softmax_point,
        traits=SOFTMAX_TRAITS[:2],
        regimes=SIGMOID_REGIMES,
        flops=flops,
        workloads=(Workload("minimax-m2/prefill-4096", softmax_sizes(4096, 256, 8, True), "MiniMaxAI/MiniMax-M2 config.json"),),
        selection=Selection("topk_ids", _sigmoids, "top_k"),
        relabel=shuffled_experts,
        rejections=SOFTMAX_REJECTIONS,
        implementations=(triton(),),
    )


@row
def sigmoid_input_scaling() -> Contract:
    """The row of `routers.sigmoid_input_scaling`."""
    return Contract(
        name="routers.sigmoid_input_scaling",
        summary="Each token goes to the experts of its top_k highest logits, which read it times the sigmoid of those.",
        formula="ids = topk(router_logits); weights = sigmoid(router_logits[ids])",
        source="Llama 4 (Llama4Router of transformers)",
        reference=routers.sigmoid_input_scaling,
        inputs=(LOGITS,),
        outputs=OUTPUTS,
        options=("top_k",),
        batch="num_tokens",
        landmarks=(
            sizes(64, 60, 4),
            sizes(17, 300, 8),
            sizes(5, 3, 3),
            sizes(33, 16, 1),  # Llama 4 Scout
            sizes(17, 128, 1),  # Llama 4 Maverick
        ),
        factors=FACTORS,
        build=point,
        traits=SOFTMAX_TRAITS[:2],
        regimes=SIGMOID_REGIMES,
        flops=flops,
        workloads=(
            Workload("llama-4-scout/prefill-4096", sizes(4096, 16, 1), "meta-llama/Llama-4-Scout-17B-16E config.json"),
            Workload("llama-4-maverick/prefill-4096", sizes(4096, 128, 1), "meta-llama/Llama-4-Maverick-17B-128E config.json"),
        ),
        selection=Selection("topk_ids", _logits, "top_k"),
        relabel=shuffled_experts,
        rejections=SOFTMAX_REJECTIONS,
        implementations=(triton(),),
    )


LOGITS = Input("router_logits", ("num_tokens", "num_experts"), differentiable=True)
OUTPUTS = (
    Output("topk_weights", ("num_tokens", "top_k"), dtype="float32", differentiable=True),
    Output("topk_ids", ("num_tokens", "top_k"), dtype="int64", indexes="num_experts"),
)


def flops(parameters: Parameters) -> float:
    """About 20 operations a logit."""
    return 20.0 * parameters["num_tokens"] * parameters["num_experts"]


@st.composite
def softmax_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes around powers of two and above 255 experts, where lanes and ids go wrong."""
    experts = draw(st.sampled_from([1, 2, 3, 5, 8, 13, 16, 60, 64, 65, 128, 130, 257]))
    return {
        "num_tokens": draw(st.sampled_from([1, 2, 3, 7, 16, 17, 33, 64])),
        "num_experts": experts,
        "top_k": draw(st.integers(1, min(experts, 9))),
        "renormalize": draw(st.booleans()),
    }


def softmax_sizes(num_tokens: int, num_experts: int, top_k: int, renormalize: bool) -> dict[str, Any]:
    """One point of the input space."""
    return sizes(num_tokens, num_experts, top_k) | {"renormalize": renormalize}


def sizes(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the input space of routers without further options."""
    return {"num_tokens": num_tokens, "num_experts": num_experts, "top_k": top_k}


def turns(logits: torch.Tensor) -> torch.Tensor:
    """Whose turn it is: token t is for expert t, and so on again."""
    tokens, experts = logits.shape
    return torch.arange(experts) == (torch.arange(tokens) % experts)[:, None]


def _in_turn(tensors: Tensors) -> Tensors:
    """Each expert is the first choice of some token: it has the highest logit, which had another."""
    logits, turn = tensors["router_logits"], turns(tensors["router_logits"])
    if not logits.numel():
        return {}
    best = torch.zeros_like(turn).scatter(1, logits.argmax(1, keepdim=True), True)
    own = (logits * turn).sum(1, keepdim=True)
    return {"router_logits": torch.where(turn, logits.amax(1, keepdim=True), torch.where(best, own, logits))}


def negative(tensors: Tensors) -> Tensors:
    return {"router_logits": -tensors["router_logits"].abs()}


def _large(tensors: Tensors) -> Tensors:
    """Exponentials overflow, forward and backward, unless the maximum is subtracted."""
    logits = tensors["router_logits"]
    return {"router_logits": torch.where(logits > 64, logits, logits + 128)}


def each_expert(sizes: Parameters) -> bool:
    return sizes["num_tokens"] >= sizes["num_experts"]


SOFTMAX_TRAITS = (
    Trait("each expert in turn", "router_logits", _in_turn, fits=each_expert),
    Trait("negative", "router_logits", negative),
    Trait("about 128", "router_logits", _large),
)
TOKENS = edges("num_tokens", 1, 2, 15, 16, 17, 33)
CHOSEN = edges("top_k", 1, 2, 3, 4, option=True)
FACTORS = (TOKENS, kinds("num_experts", kind_of_count, 1, 2, 8, 32, 5, 13, 257), CHOSEN)
SOFTMAX_FACTORS = (*FACTORS, either("renormalize", False, True))


def point(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return sizes(num_tokens, num_experts, top_k) if top_k <= num_experts else None


def softmax_point(num_tokens: int, num_experts: int, top_k: int, renormalize: bool) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return softmax_sizes(num_tokens, num_experts, top_k, renormalize) if top_k <= num_experts else None


def logits_shape(parameters: Parameters) -> tuple[int, int]:
    return parameters["num_tokens"], parameters["num_experts"]


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random logits; each token has its own scale, from flat to peaked."""
    tokens, experts = logits_shape(parameters)
    return {"router_logits": draw.normal(tokens, experts) * 4 * draw.uniform(tokens, 1)}


def tied(draw: Draw, parameters: Parameters) -> Tensors:
    """Few distinct logits, so that most choices are ties; some rows all equal, zeros of both signs."""
    logits = draw.integers(-1, 2, *logits_shape(parameters)).to(torch.float64)
    logits[::3] = 0.5
    return {"router_logits": torch.where((logits == 0) & (draw.uniform(*logits.shape) < 0.5), -0.0, logits)}


def extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits near ±10^4 with a common offset: exponentials overflow unless the maximum is subtracted; some lie a unit of float32
    apart, which a comparison must see."""
    tokens, experts = logits_shape(parameters)
    offset = torch.tensor([0.0, 1e4, -1e4, 200.0], dtype=torch.float64)[draw.integers(0, 4, tokens, 1)]
    wide, near = 30 * draw.normal(tokens, experts), draw.integers(0, 16, tokens, experts) * 2.0**-10
    return {"router_logits": offset + torch.where(draw.uniform(tokens, 1) < 0.25, near, wide)}


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """A power of two of equal logits, all of them chosen, among -inf ones: every weight is a power of two, or 0."""
    return equal_logits(draw, parameters, 2 ** int(math.log2(parameters["top_k"])))


def equal_logits(draw: Draw, parameters: Parameters, finite: int) -> Tensors:
    """So many in each row, the rest -inf."""
    tokens, experts = logits_shape(parameters)
    allowed = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, draw.distinct_rows(tokens, finite, experts), True)
    return {"router_logits": torch.where(allowed, draw.integers(-8, 9, tokens, 1).to(torch.float64), -math.inf)}


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """Some rows hold NaN, some logits are -inf; the other rows are ordinary."""
    tokens, experts = logits_shape(parameters)
    logits = draw.normal(tokens, experts)
    logits[draw.uniform(tokens, experts) < 0.1] = -math.inf
    logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)  # no row of -inf alone: its softmax has no value
    logits[1::3, -1] = math.nan
    return {"router_logits": logits}


SOFTMAX_REGIMES = (
    Regime("dithered", dithered),
    Regime("ties", tied, "worst element", differentiable=False),
    # where one probability is all but 1, formulas of its gradient that are equally good lose all their digits or none
    Regime("adversarial", extreme, "worst element", differentiable=False),
    Regime("special", special, "worst element", differentiable=False),
)


def vanishing(draw: Draw, parameters: Parameters) -> Tensors:
    """Sigmoids near 10^-20, beside which the epsilon of the renormalization shows."""
    return {"router_logits": -46 + 2 * draw.normal(*logits_shape(parameters))}


SIGMOID_REGIMES = (*SOFTMAX_REGIMES, Regime("constant-probing", vanishing, "worst element"))


def shuffled_experts(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Any order of the experts."""
    return draw.permutation(parameters["num_experts"])


SOFTMAX_REJECTIONS = (
    Rejection("top_k above num_experts", "top_k", lambda call: {"top_k": call["router_logits"].shape[1] + 1}),
    Rejection("top_k of zero", "top_k", lambda call: {"top_k": 0}),
)


def _softmax_scores(router_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.softmax(router_logits, -1)


def _sigmoids(router_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.sigmoid(router_logits)


def _logits(router_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    return router_logits


def _softmax_of_all_renormalized(router_logits: torch.Tensor, *, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The other order: renormalized, the softmax of all logits is that of the chosen."""
    return routers.softmax_topk(router_logits, top_k=top_k, renormalize=True)


def _softmax_of_chosen(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The commonest other way: the softmax of the chosen logits is the renormalized softmax of all."""
    topk_ids = router_logits.topk(top_k, -1).indices
    chosen = router_logits.gather(-1, topk_ids)
    if renormalize:
        return chosen.softmax(-1), topk_ids
    return torch.softmax(router_logits, -1).gather(-1, topk_ids), topk_ids
