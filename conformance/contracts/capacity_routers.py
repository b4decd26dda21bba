"""Contracts of the routers whose experts have room for so many tokens."""

from typing import Any

import torch

from gaugeblock.conformance.contracts import routers as of_routers
from gaugeblock.conformance.engine.contract import Contract, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Factor, edges, kind_of_count, kinds
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
        without={
            "batch_invariance": IN_ORDER,
            "permutation_equivariance": IN_ORDER,
            "nan_containment": "a token of NaN goes to any expert, and takes its room",
        },
        implementations=(triton(),),
    )


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


REJECTIONS = (
    Rejection("no experts", "router_logits", lambda call: {"router_logits": call["router_logits"][:, :0]}),
    Rejection("no capacity", "capacity_factor", lambda call: {"capacity_factor": 0.0}),
    Rejection("a negative capacity", "capacity_factor", lambda call: {"capacity_factor": -1.0}),
)


IN_ORDER = "which tokens are dropped depends on those before them"


def _scores(router_logits: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.softmax(router_logits, -1)
