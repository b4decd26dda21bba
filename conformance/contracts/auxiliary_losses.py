"""Contracts of the auxiliary losses of Mixture-of-Experts layers."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import moe_layers as of_layers
from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import auxiliary_losses


@row
def load_balancing_loss() -> Contract:
    """The row of `auxiliary_losses.load_balancing_loss`."""
    return Contract(
        name="auxiliary_losses.load_balancing_loss",
        summary="How uneven the load of the experts is: 1 where it is even, num_experts / top_k where all tokens agree.",
        formula=(
            "num_experts * sum over e of share[e] * probability[e], over the tokens of the mask; share[e] = part of their top_k "
            "assignments each that chose e; probability[e] = mean of softmax(router_logits)[e]; 0 where there is no token"
        ),
        source="Switch Transformers (arXiv:2101.03961) eq. 4 to 6; transformers' load_balancing_loss_func is top_k times it",
        reference=auxiliary_losses.load_balancing_loss,
        inputs=(LOGITS, IDS, MASK),
        outputs=(Output("loss", (), dtype="float32", differentiable=True),),
        options=(),
        batch="num_tokens",
        parameters=loss_parameters,
        landmarks=(
            loss_sizes(100, 5, 3),  # where columns lie far apart, the last of three is beyond 2^31
            loss_sizes(33, 8, 2),  # Mixtral
            loss_sizes(17, 300, 8),  # ids above 255
            loss_sizes(513, 513, 1),  # each of 512 programs goes on to a second tile of a token
            loss_sizes(17, 128, 8),  # Qwen3
        ),
        factors=(edges("num_tokens", 1, 2, 15, 16, 17, 33, 257), *LOSS_FACTORS[1:]),  # more than bfloat16 can count, or a byte
        build=loss_point,
        traits=BALANCE_TRAITS,
        regimes=BALANCE_REGIMES,
        cases=0.5,
        flops=flops,
        workloads=LOSS_WORKLOADS,
        relabel=of_experts.shuffled,
        rejections=BALANCE_REJECTIONS,
        without=MEAN,
        implementations=(triton(),),
    )


@row
def router_z_loss() -> Contract:
    """The row of `auxiliary_losses.router_z_loss`."""
    return Contract(
        name="auxiliary_losses.router_z_loss",
        summary="How large the logits of a router are.",
        formula="mean over the tokens of the mask of logsumexp(router_logits) ** 2; 0 where there is no token",
        source="ST-MoE (arXiv:2202.08906) equation 5",
        reference=auxiliary_losses.router_z_loss,
        inputs=(LOGITS, MASK),
        outputs=(Output("loss", (), dtype="float32", differentiable=True),),
        options=(),
        batch="num_tokens",
        parameters=loss_parameters,
        landmarks=Z_LANDMARKS,
        factors=LOSS_FACTORS[:2],  # it has no top_k
        build=lambda num_tokens, num_experts: loss_sizes(num_tokens, num_experts, 1),
        traits=MASK_TRAITS,
        regimes=Z_REGIMES,
        cases=0.5,
        flops=flops,
        workloads=LOSS_WORKLOADS,
        formulas=(_log_of_sum,),
        relabel=of_experts.shuffled,
        rejections=Z_REJECTIONS,
        without=MEAN,
        implementations=(triton(),),
    )


@row
def routing_entropy() -> Contract:
    """The row of `auxiliary_losses.routing_entropy`."""
    return Contract(
        name="auxiliary_losses.routing_entropy",
        summary="How undecided a router is, in nats.",
        formula="mean over the tokens of the mask of -(sum over e of p[e] * ln(p[e])), p = softmax(router_logits); 0 * ln(0) = 0",
        source="Shannon 1948 section 6; without the 1e-9 that moe-emergence adds to p",
        reference=auxiliary_losses.routing_entropy,
        inputs=(LOGITS, MASK),
        outputs=(Output("entropy", (), dtype="float32", differentiable=True),),
        options=(),
        batch="num_tokens",
        parameters=loss_parameters,
        landmarks=Z_LANDMARKS,
        factors=LOSS_FACTORS[:2],  # it has no top_k
        build=lambda num_tokens, num_experts: loss_sizes(num_tokens, num_experts, 1),
        traits=MASK_TRAITS,
        regimes=Z_REGIMES,
        cases=0.5,
        flops=flops,
        workloads=LOSS_WORKLOADS,
        formulas=(_log_of_total,),
        relabel=of_experts.shuffled,
        rejections=Z_REJECTIONS,
        without=MEAN,
        implementations=(triton(),),
    )


def flops(parameters: Parameters) -> float:
    """About 10 operations a logit."""
    return 10.0 * parameters["num_tokens"] * parameters["num_experts"]


def loss_sizes(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the losses' input space."""
    return {"num_tokens": num_tokens, "num_experts": num_experts, "top_k": top_k}


Z_LANDMARKS = (
    loss_sizes(33, 8, 2),
    loss_sizes(100, 5, 3),
    loss_sizes(17, 300, 8),
    loss_sizes(513, 513, 1),
    loss_sizes(17, 128, 8),
)


@st.composite
def loss_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes around powers of two; enough tokens for several blocks of them."""
    experts = draw(st.sampled_from([1, 2, 3, 5, 8, 13, 16, 60]))
    tokens = draw(st.sampled_from([1, 2, 3, 7, 16, 17, 33, 64]))
    return loss_sizes(tokens, experts, draw(st.integers(1, min(experts, 5))))


LOSS_FACTORS = (
    edges("num_tokens", 1, 2, 15, 16, 17, 33),
    kinds("num_experts", kind_of_count, 1, 2, 8, 32, 5, 13, 257),
    edges("top_k", 1, 2, 3, 4),
)


MASK_TRAITS = tuple(
    Trait(name, "attention_mask", change)
    for name, change in (
        ("no padding", lambda tensors: {"attention_mask": torch.ones_like(tensors["attention_mask"])}),
        ("all padding", lambda tensors: {"attention_mask": torch.zeros_like(tensors["attention_mask"])}),
        ("padding in front", lambda tensors: {"attention_mask": tensors["attention_mask"].sort().values}),
    )
)


def loss_point(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return loss_sizes(num_tokens, num_experts, top_k) if top_k <= num_experts else None


def _in_turn(tensors: Tensors) -> Tensors:
    """Each expert is the first choice of some token."""
    ids, experts = tensors["topk_ids"], tensors["router_logits"].shape[1]
    return {"topk_ids": (torch.arange(len(ids))[:, None] + torch.arange(ids.shape[1])) % experts}


def _each_expert(sizes: Parameters) -> bool:
    return sizes["num_tokens"] >= sizes["num_experts"]


BALANCE_TRAITS = (
    *MASK_TRAITS,
    of_experts.INT32,
    Trait("each expert in turn", "values of topk_ids", _in_turn, fits=_each_expert),
)


def _tokens(draw: Draw, parameters: Parameters, router_logits: torch.Tensor) -> Tensors:
    """Logits with any choice of experts, a quarter of the tokens being padding."""
    tokens, top_k = parameters["num_tokens"], parameters["top_k"]
    ids = draw.distinct_rows(tokens, top_k, parameters["num_experts"])
    return {"router_logits": router_logits, "topk_ids": ids, "attention_mask": draw.uniform(tokens) < 0.75}


def loss_dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random logits; each token has its own scale, from flat to peaked."""
    tokens = parameters["num_tokens"]
    return _tokens(draw, parameters, draw.normal(tokens, parameters["num_experts"]) * 4 * draw.uniform(tokens, 1))


def loss_skewed(draw: Draw, parameters: Parameters) -> Tensors:
    """All tokens choose the same experts, which have the highest logits; all is padding, or nothing."""
    tokens, experts = parameters["num_tokens"], parameters["num_experts"]
    order = draw.permutation(experts)
    # probabilities stay above 2^-126, below which XLA has only zero
    logits = draw.normal(tokens, experts) - order.argsort() * min(1.0, 64 / experts)
    tensors = _tokens(draw, parameters, logits)
    everything = torch.full((tokens,), draw.uniform(1).item() < 0.75)
    return tensors | {"topk_ids": order[: parameters["top_k"]].repeat(tokens, 1), "attention_mask": everything}


def loss_extreme(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits near ±10^4 with a common offset: exponentials overflow unless the maximum is subtracted."""
    tokens, experts = parameters["num_tokens"], parameters["num_experts"]
    offset = torch.tensor([0.0, 1e4, -1e4, 200.0], dtype=torch.float64)[draw.integers(0, 4, tokens, 1)]
    return _tokens(draw, parameters, offset + 30 * draw.normal(tokens, experts))


def loss_special(draw: Draw, parameters: Parameters) -> Tensors:
    """Some logits of -inf; padding holds NaN and infinities."""
    tokens, experts = parameters["num_tokens"], parameters["num_experts"]
    tensors = loss_dithered(draw, parameters)
    logits = torch.where(draw.uniform(tokens, experts) < 0.2, -math.inf, tensors["router_logits"])
    logits[:, 0] = tensors["router_logits"][:, 0]  # no row of -inf alone: its softmax has no value
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)[draw.integers(0, 3, tokens, 1)]
    return tensors | {"router_logits": torch.where(tensors["attention_mask"][:, None], logits, poison)}


def loss_lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """A power of two of tokens count; each has one finite logit, an integer, and chooses one expert, as often as it may."""
    tokens, experts, top_k = (parameters[name] for name in ("num_tokens", "num_experts", "top_k"))
    finite = draw.distinct_rows(tokens, 1, experts)
    empty = torch.full((tokens, experts), -math.inf, dtype=torch.float64)
    logits = empty.scatter(1, finite, draw.integers(-8, 9, tokens, 1).to(torch.float64))
    return {
        "router_logits": logits,
        "topk_ids": torch.where(draw.uniform(tokens, 1) < 0.5, finite, draw.integers(0, experts, tokens, 1)).expand(-1, top_k),
        "attention_mask": draw.permutation(tokens) < 2 ** int(math.log2(tokens)) if tokens else torch.zeros(0).bool(),
    }


def _without_ids(make: Callable[[Draw, Parameters], Tensors]) -> Callable[[Draw, Parameters], Tensors]:
    def made(draw: Draw, parameters: Parameters) -> Tensors:
        return {name: tensor for name, tensor in make(draw, parameters).items() if name != "topk_ids"}

    return made


BALANCE_REGIMES = (
    Regime("dithered", loss_dithered),
    Regime("skew", loss_skewed),
    # where one probability is all but 1, formulas of its gradient that are equally good lose all their digits or none
    Regime("adversarial", loss_extreme, "worst element", differentiable=False),
    Regime("special", loss_special, "worst element"),
    Regime("lattice", loss_lattice, "exact", differentiable=False),
)


Z_REGIMES = tuple(replace(each, make=_without_ids(each.make)) for each in BALANCE_REGIMES)


Z_REJECTIONS = (Rejection("no experts", "router_logits", changed("router_logits", lambda each: each[..., :0])),)


BALANCE_REJECTIONS = (
    *Z_REJECTIONS,
    Rejection("no ids", "topk_ids", changed("topk_ids", lambda each: each[..., :0])),
)


def _log_of_sum(router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What kernels do: a logsumexp is the highest logit plus a logarithm, which may cancel."""
    logits = torch.where(attention_mask[:, None], router_logits, 0)
    highest = logits.amax(-1, keepdim=True).detach()
    z = highest[:, 0] + (logits - highest).exp().sum(-1).log()
    return torch.where(attention_mask, z, 0).square().sum() / attention_mask.sum().clamp(min=1)


def _log_of_total(router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What kernels do: a logarithm of the sum of exponentials, and the mean of how far the logits lie below the highest."""
    logits = torch.where(attention_mask[:, None], router_logits, 0)
    below = logits - logits.amax(-1, keepdim=True).detach()
    exponentials = below.exp()
    total = exponentials.sum(-1)
    entropy = total.log() - (exponentials * torch.where(exponentials == 0, 0, below)).sum(-1) / total
    return torch.where(attention_mask, entropy, 0).sum() / attention_mask.sum().clamp(min=1)


LOGITS = Input("router_logits", ("num_tokens", "num_experts"), differentiable=True)


IDS = Input("topk_ids", ("num_tokens", "top_k"), dtype="int64", indexes="num_experts")


MASK = Input("attention_mask", ("num_tokens",), dtype="bool")


MEAN = {
    "batch_invariance": "a mean depends on all of its batch",
    "nan_containment": "a mean has no examples; padding of NaN is in the regime special",
}


LOSS_WORKLOADS = (
    Workload("mixtral-8x7b/prefill-4096", loss_sizes(4096, 8, 2), of_layers.MIXTRAL_8X7B),
    Workload("qwen3-30b-a3b/prefill-4096", loss_sizes(4096, 128, 8), "Qwen/Qwen3-30B-A3B config.json"),
    Workload("olmoe-1b-7b/train-65536", loss_sizes(65536, 64, 8), "allenai/OLMoE-1B-7B-0924 config.json; 16 sequences of 4096"),
)
