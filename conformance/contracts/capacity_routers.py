"""Contracts of the routers whose experts have room for so many tokens."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gaugeblock.conformance.contracts import auxiliary_losses as of_losses
from gaugeblock.conformance.contracts import routers as of_routers
from gaugeblock.conformance.engine.contract import Contract, Derived, Input, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import capacity_routers


@row
def switch_top1() -> Contract:
    """The row of `capacity_routers.switch_top1`."""
    return Contract(
        name="capacity_routers.switch_top1",
        summary="Each token goes to its most probable expert, unless as many before it as the expert has room for did so too.",
        formula=(
            "p = softmax(router_logits); id = argmax(p); dropped[t] = at least ceil(num_tokens * capacity_factor / num_experts) "
            "tokens s < t have id[s] = id[t]; weight = p[id], or 0 if dropped"
        ),
        source="Switch Transformers (arXiv:2101.03961) section 2.2, equation 3, and figure 3",
        reference=capacity_routers.switch_top1,
        inputs=(of_routers.LOGITS,),
        outputs=(
            Output("weights", ("num_tokens",), dtype="float32", differentiable=True),
            Output("expert_ids", ("num_tokens",), dtype="int64", indexes="num_experts"),
            Output("dropped", ("num_tokens",), dtype="bool"),
        ),
        options=("capacity_factor",),
        batch="num_tokens",
        landmarks=(
            sizes(66, 8, 1.25),
            sizes(33, 5, 1.1),  # 33 * 1.1 / 5 is 7.26, and float32's 1.1 is more
            sizes(130, 300, 1.0),  # ids above 255, room for one
            sizes(65, 128, 1.25),  # google/switch-base-128
            sizes(700, 2, 1.0),  # more tokens than bfloat16 can count, or a byte
        ),
        factors=FACTORS,
        build=sizes,
        traits=of_routers.SOFTMAX_TRAITS,
        regimes=(
            Regime("dithered", of_routers.dithered),
            Regime("skew", skewed),
            *of_routers.SOFTMAX_REGIMES[1:],
            Regime("lattice", lattice, "exact", differentiable=False),
        ),
        flops=of_routers.flops,
        workloads=(
            Workload("switch-base-8/train-4096", sizes(4096, 8, 1.25), "arXiv:2101.03961 tables 1 and 9; google/switch-base-8"),
            Workload("switch-base-128/train-4096", sizes(4096, 128, 1.25), "arXiv:2101.03961 table 9; google/switch-base-128"),
            Workload("switch-c-2048/train-4096", sizes(4096, 2048, 1.25), "arXiv:2101.03961 table 9; google/switch-c-2048"),
        ),
        selection=Selection("expert_ids", _scores, 1),
        relabel=of_routers.shuffled_experts,
        rejections=REJECTIONS,
        without=WITHOUT,
        implementations=(triton(),),
    )


@row
def gshard_top2() -> Contract:
    """The row of `capacity_routers.gshard_top2`."""
    return Contract(
        name="capacity_routers.gshard_top2",
        summary="Each token goes to two experts, the second with a random draw, unless they have no more room.",
        formula=(
            "p = softmax(router_logits); first = argmax(p); second = argmax(router_logits [+ noise if sampling]) of the others; "
            "w = p[ids] [divided by their sum if normalize_before_dropping]; experts are asked for room by all first choices in "
            "the order of tokens, then by all second ones, but not by padding, nor, if random, by second ones with 2 * w "
            "<= noise[second]; dropped = not asked, or asked ceil(num_tokens * capacity_factor / num_experts) times before; "
            "weights = w, or 0 if dropped [divided by max(their sum, 2^-23) if not normalize_before_dropping]"
        ),
        source="GShard (arXiv:2006.16668) algorithm 1; NLLB (arXiv:2207.04672); transformers' NllbMoeTop2Router",
        reference=capacity_routers.gshard_top2,
        inputs=(of_routers.LOGITS, Input("noise", ("num_tokens", "num_experts"), dtype="float32"), of_losses.MASK),
        outputs=(
            Output("topk_weights", ("num_tokens", 2), dtype="float32", differentiable=True),
            Output("topk_ids", ("num_tokens", 2), dtype="int64", indexes="num_experts"),
            Output("dropped", ("num_tokens", 2), dtype="bool"),
        ),
        options=("second_expert_policy", "normalize_before_dropping", "capacity_factor"),
        batch="num_tokens",
        landmarks=(
            top2_sizes(66, 8, "all", False, 1.25),
            top2_sizes(33, 5, "sampling", True, 1.1),
            top2_sizes(65, 13, "random", True, 2.0),  # GShard, but for the number of experts
            top2_sizes(65, 128, "all", False, 2.0),  # NLLB
            top2_sizes(17, 300, "sampling", False, 40.0),  # ids above 255
            top2_sizes(350, 2, "random", False, 0.75),  # more choices than bfloat16 can count, or a byte
        ),
        factors=TOP2_FACTORS,
        build=top2_point,
        traits=(*LOGIT_TRAITS, *of_losses.MASK_TRAITS),
        regimes=(
            Regime("dithered", top2(of_routers.dithered)),
            Regime("skew", top2(skewed_twice)),
            *(replace(each, make=top2(each.make)) for each in of_routers.SOFTMAX_REGIMES[1:]),
            Regime("padding", poisoned),
            Regime("lattice", top2(lattice), "exact", differentiable=False),
        ),
        flops=of_routers.flops,
        workloads=TOP2_WORKLOADS,
        selection=Selection("topk_ids", _scores_of_each, 2, one_by_one=True),
        relabel=of_routers.shuffled_experts,
        rejections=TOP2_REJECTIONS,
        without=WITHOUT,
        implementations=(triton(),),
    )


@row
def expert_choice() -> Contract:
    """The row of `capacity_routers.expert_choice`."""
    return Contract(
        name="capacity_routers.expert_choice",
        summary="Each expert takes the tokens to which it is most probable, as many as it has room for.",
        formula=(
            "p = softmax(router_logits); token_ids[e] = topk(p[:, e]), as many as min(ceil(num_tokens * capacity_factor / "
            "num_experts), num_tokens); weights[e] = p[token_ids[e], e]"
        ),
        source="Mixture-of-Experts with Expert Choice Routing (arXiv:2202.09368) section 3.2",
        reference=capacity_routers.expert_choice,
        inputs=(of_routers.LOGITS,),
        outputs=(
            Output("weights", ("num_experts", CHOSEN_TOKENS), dtype="float32", differentiable=True),
            Output("token_ids", ("num_experts", CHOSEN_TOKENS), dtype="int64", indexes="num_tokens"),
        ),
        options=("capacity_factor",),
        batch="num_tokens",
        landmarks=(
            sizes(66, 8, 2),  # a number may be an integer
            sizes(33, 5, 1.1),
            sizes(65, 64, 2.0),  # the paper's 64 experts
            sizes(17, 300, 1.0),
            sizes(300, 3, 1.0),  # ids above 255
        ),
        factors=FACTORS,
        build=sizes,
        traits=of_routers.SOFTMAX_TRAITS,
        regimes=(
            *of_routers.SOFTMAX_REGIMES,
            Regime("infinite", infinite, "worst element"),
            Regime("lattice", lattice, "exact", differentiable=False),
        ),
        flops=of_routers.flops,
        workloads=(
            Workload("expert-choice-8b-64e/train-4096", sizes(4096, 64, 2.0), "arXiv:2202.09368: 8B/64E"),
            Workload("expert-choice-0.1b-16e/train-4096", sizes(4096, 16, 2.0), "arXiv:2202.09368: 0.1B/16E"),
        ),
        selection=Selection("token_ids", _scores_of_tokens, CHOSEN_TOKENS),
        relabel=of_routers.shuffled_experts,
        rejections=REJECTIONS,
        without={
            "batch_invariance": ALL_TOKENS,
            "permutation_equivariance": "the outputs name tokens by their place in the batch",
            "nan_containment": "an expert may choose a token of NaN before any other",
        },
        implementations=(triton(),),
    )


def top2_sizes(
    num_tokens: int, num_experts: int, second_expert_policy: str, normalize_before_dropping: bool, capacity_factor: float
) -> dict[str, Any]:
    """One point of the input space of `gshard_top2`."""
    options = {"second_expert_policy": second_expert_policy, "normalize_before_dropping": normalize_before_dropping}
    return sizes(num_tokens, num_experts, capacity_factor) | options


def top2_point(
    num_tokens: int, num_experts: int, second_expert_policy: str, normalize_before_dropping: bool, capacity_factor: float
) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    if num_experts < 2:
        return None
    return top2_sizes(num_tokens, num_experts, second_expert_policy, normalize_before_dropping, capacity_factor)


def sizes(num_tokens: int, num_experts: int, capacity_factor: float) -> dict[str, Any]:
    """One point of the input space."""
    return {"num_tokens": num_tokens, "num_experts": num_experts, "capacity_factor": capacity_factor}


def _room(parameters: Parameters) -> str:
    """What an expert has room for."""
    capacity = capacity_routers.expert_capacity(*(parameters[name] for name in ("num_tokens", "num_experts", "capacity_factor")))
    if capacity >= parameters["num_tokens"]:
        return "all tokens"
    return "one token" if capacity == 1 else "some tokens"


def _side_of_1(factor: float) -> str:
    return "below 1" if factor < 1 else "1 and more"


def _share(parameters: Parameters) -> str:
    """Whether the capacity is rounded up."""
    room = parameters["num_tokens"] * parameters["capacity_factor"] / parameters["num_experts"]
    return "an integer" if room == int(room) else "no integer"


FACTORS = (
    edges("num_tokens", 1, 2, 17, 64, 65, 130),
    kinds("num_experts", kind_of_count, 1, 2, 8, 32, 5, 13, 257),
    Factor("capacity_factor", _side_of_1, values=(0.5, 2**-6, 1.0, 1.1, 1.25, 2, 300.0), option=True),
    Factor("room", str, of=_room),
    Factor("num_tokens * capacity_factor / num_experts", str, of=_share),
)


def _fits_any_noise(trait: Trait, parameters: Parameters) -> bool:
    return trait.fits(parameters) and parameters["second_expert_policy"] != "random"


TOP2_FACTORS = (
    edges("num_tokens", 1, 2, 17, 64, 65, 130),
    kinds("num_experts", kind_of_count, 2, 8, 32, 5, 13, 257),
    either("second_expert_policy", "all", "sampling", "random"),
    either("normalize_before_dropping", False, True),
    Factor("capacity_factor", _side_of_1, values=(0.5, 2**-6, 1.0, 1.1, 2, 300.0), option=True),
    Factor("room", str, of=_room),
)
LOGIT_TRAITS = tuple(  # "random" has noise that lies beside a threshold of just these logits
    replace(trait, fits=partial(_fits_any_noise, trait)) for trait in of_routers.SOFTMAX_TRAITS
)
TOP2_WORKLOADS = (
    Workload("nllb-moe-54b/train-4096", top2_sizes(4096, 128, "all", False, 2.0), "transformers' NllbMoeConfig"),
    Workload("gshard-600b/train-4096", top2_sizes(4096, 2048, "random", True, 2.0), "arXiv:2006.16668: 2048 experts"),
)


def skewed(draw: Draw, parameters: Parameters) -> Tensors:
    """All tokens on one expert, or just as many as it has room for, or one more, one less; the others on the next."""
    tokens, experts = parameters["num_tokens"], parameters["num_experts"]
    capacity = capacity_routers.expert_capacity(tokens, experts, parameters["capacity_factor"])
    favoured = (tokens, capacity - 1, capacity, capacity + 1)[int(draw.integers(0, 4, 1))]
    favourite = draw.integers(0, experts, 1)
    ids = torch.where(draw.permutation(tokens) < favoured, favourite, (favourite + 1) % experts)
    logits = draw.normal(tokens, experts)
    return {"router_logits": logits.scatter_add(1, ids[:, None], 6 + draw.uniform(tokens, 1))}


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Few equal logits among -inf ones: every weight is a power of two, or 0."""
    return of_routers.equal_logits(
        draw, parameters, 2 ** int(draw.integers(0, min(parameters["num_experts"], 8).bit_length(), 1))
    )


def skewed_twice(draw: Draw, parameters: Parameters) -> Tensors:
    """As `skewed`, and those that do not choose the favourite first choose it second, or the other way round."""
    logits = skewed(draw, parameters)["router_logits"]
    favourites = logits.sum(0).topk(2).indices
    return {"router_logits": logits.index_add(1, favourites, 3 + draw.uniform(len(logits), 2))}


def top2(make: Callable[[Draw, Parameters], Tensors]) -> Callable[[Draw, Parameters], Tensors]:
    """With the noise that the policy wants, a quarter of the tokens being padding."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        logits = make(draw, parameters)["router_logits"]
        uniform = draw.uniform(*logits.shape).clamp(2.0**-20)
        tensors = {"router_logits": logits, "noise": uniform, "attention_mask": draw.uniform(len(logits)) < 0.75}
        if parameters["second_expert_policy"] == "sampling":
            return tensors | {"noise": -(-uniform.log()).log()}
        return tensors | _decided(draw, parameters, tensors) if parameters["second_expert_policy"] == "random" else tensors

    return made


def poisoned(draw: Draw, parameters: Parameters) -> Tensors:
    """Padding holds NaN and infinities."""
    tensors = top2(of_routers.dithered)(draw, parameters)
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)[draw.integers(0, 3, parameters["num_tokens"], 1)]
    kept = tensors["attention_mask"][:, None]
    return tensors | {name: torch.where(kept, tensors[name], poison) for name in ("router_logits", "noise")}


def _decided(draw: Draw, parameters: Parameters, tensors: Tensors) -> Tensors:
    """Uniform numbers of which half lie a hundredth beside the threshold, and none so near that rounding decides.

    The logits are such as every dtype holds: rounded later, they would move it.
    """
    logits = tensors["router_logits"].to(torch.bfloat16).to(torch.float64)
    best = torch.softmax(logits, -1).topk(2, -1).values
    total = best.sum(-1, keepdim=True) if parameters["normalize_before_dropping"] else 1
    threshold = (2 * best / total)[:, 1:]
    beside = threshold * (1 + 0.01 * (2 * draw.integers(0, 2, *logits.shape) - 1))
    noise = torch.where((draw.uniform(*logits.shape) < 0.5) & (beside < 1) & (beside > 2.0**-20), beside, tensors["noise"])
    too_near = (noise - threshold).abs() < 0.005 * threshold
    return {"router_logits": logits, "noise": torch.where(too_near, 0.99 * threshold, noise)}


REJECTIONS = (
    Rejection("no experts", "router_logits", lambda call: {"router_logits": call["router_logits"][:, :0]}),
    Rejection("no capacity", "capacity_factor", lambda call: {"capacity_factor": 0.0}),
    Rejection("a negative capacity", "capacity_factor", lambda call: {"capacity_factor": -1.0}),
)


def infinite(draw: Draw, parameters: Parameters) -> Tensors:
    """Some logits are -inf, and most of the last of several experts, which so takes tokens of probability 0. With a NaN as well,
    any choice of any expert would do."""
    logits = of_routers.special(draw, parameters)["router_logits"].nan_to_num(0.0, neginf=-math.inf)
    if logits.shape[1] > 1:
        logits[draw.uniform(len(logits)) < 0.9, -1] = -math.inf
    return {"router_logits": logits}


TOP2_REJECTIONS = (
    *REJECTIONS,
    Rejection("one expert", "router_logits", lambda call: {name: call[name][:, :1] for name in ("router_logits", "noise")}),
)


IN_ORDER = "which tokens are dropped depends on those before them"


WITHOUT = {
    "batch_invariance": IN_ORDER,
    "permutation_equivariance": IN_ORDER,
    "nan_containment": "a token of NaN goes to any expert, and takes its room",
}


ALL_TOKENS = "what an expert chooses depends on all tokens"


def _scores_of_each(
    router_logits: torch.Tensor, noise: torch.Tensor, attention_mask: torch.Tensor, *, second_expert_policy: str, **_: Any
) -> torch.Tensor:
    """By which the first and the second are chosen, `[num_tokens, 2, num_experts]`; padding chooses any."""
    second = router_logits + noise if second_expert_policy == "sampling" else router_logits
    probabilities = torch.softmax(torch.stack([router_logits, second], 1), -1)
    return torch.where(attention_mask[:, None, None], probabilities, 0)


def _scores_of_tokens(router_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.softmax(router_logits, -1).T


def _chosen_tokens(parameters: Parameters) -> int:
    return capacity_routers.chosen_tokens(*(parameters[name] for name in ("num_tokens", "num_experts", "capacity_factor")))


CHOSEN_TOKENS = Derived("chosen_tokens", _chosen_tokens)


def _scores(router_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.softmax(router_logits, -1)
