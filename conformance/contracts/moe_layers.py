"""Contracts of the MoE layers and of their losses."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.contracts import experts as of_experts
from gaugeblock.conformance.engine.contract import (
    Contract,
    Cost,
    Input,
    Output,
    Parameters,
    Regime,
    Rejection,
    Selection,
    Tensors,
    Workload,
    row,
)
from gaugeblock.conformance.engine.factors import Trait, edges, kind_of_count, kinds
from gaugeblock.conformance.engine.implementation import jax, triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.reference.torch import experts, moe_layers


@row
def mixtral_moe() -> Contract:
    """The row of `moe_layers.mixtral_moe`."""
    return Contract(
        name="moe_layers.mixtral_moe",
        summary="Each token passes the SwiGLU experts that a linear router gives the highest probability.",
        formula=(
            "router_logits = hidden_states @ gate.weight.T; topk_weights, topk_ids = softmax_topk(router_logits), renormalized; "
            "hidden_states_out = fused_swiglu(hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids)"
        ),
        source="Mixtral of Experts (arXiv:2401.04088) section 2.1; names of parameters as in transformers' MixtralSparseMoeBlock",
        reference=moe_layers.mixtral_moe,
        inputs=(
            Input("hidden_states", ("num_tokens", "hidden_size"), differentiable=True),
            Input("state", differentiable=True, leaves=mixtral_state),
        ),
        outputs=(
            Output("hidden_states_out", ("num_tokens", "hidden_size"), differentiable=True),
            Output("router_logits", ("num_tokens", "num_experts"), dtype="float32", differentiable=True),
            Output("topk_ids", ("num_tokens", "top_k"), dtype="int64", indexes="num_experts"),
        ),
        options=("top_k",),
        batch="num_tokens",
        parameters=of_experts.parameters,
        landmarks=(
            of_experts.sizes(33, 40, 24, 5, 2),  # tails everywhere
            of_experts.sizes(70, 16, 32, 3, 2),  # several tiles of rows for an expert
            of_experts.sizes(5, 40, 24, 32, 4),  # most experts without tokens
            of_experts.sizes(17, 24, 16, 6, 1),  # one expert per token, whose weight is 1: no gradient reaches the gate by it
            of_experts.sizes(17, 24, 16, 8, 2),  # Mixtral's experts
            of_experts.sizes(3, 16, 8, 128, 8),  # Qwen3's
        ),
        factors=of_experts.FACTORS,
        build=of_experts.point,
        traits=(
            Trait(
                "each expert in turn",
                "choice",
                _gate_in_turn,
                fits=lambda sizes: sizes["num_tokens"] >= sizes["num_experts"] and sizes["hidden_size"] > 1,
            ),
        ),
        regimes=(
            Regime("dithered", _gated(of_experts.dithered)),
            Regime("skew", skewed),
            Regime("ties", tied, "worst element", differentiable=False),
            Regime("special", _gated(of_experts.special), "worst element", differentiable=False),
            Regime("lattice", lattice, "exact", differentiable=False),
        ),
        cases=0.5,
        cost=mixtral_cost,
        workloads=(
            Workload("mixtral-8x7b/prefill-4096", of_experts.sizes(4096, 4096, 14336, 8, 2), MIXTRAL_8X7B),
            Workload("mixtral-8x22b/prefill-4096", of_experts.sizes(4096, 6144, 16384, 8, 2), MIXTRAL_8X22B),
            Workload("mixtral-8x7b/decode-64", of_experts.sizes(64, 4096, 14336, 8, 2), MIXTRAL_8X7B),
            Workload("two-cores/prefill-2048", of_experts.sizes(2048, 1024, 512, 32, 4), "this project's goal on a CPU, issue 2"),
        ),
        formulas=(_softmax_of_chosen,),
        selection=Selection("topk_ids", _scores, "top_k"),
        relabel=of_experts.shuffled,
        rejections=MIXTRAL_REJECTIONS,
        implementations=(
            triton(),
            jax("jax-grouped"),
        ),
    )


@row
def load_balancing_loss() -> Contract:
    """The row of `moe_layers.load_balancing_loss`."""
    return Contract(
        name="moe_layers.load_balancing_loss",
        summary="How uneven the load of the experts is: 1 where it is even, num_experts / top_k where all tokens agree.",
        formula=(
            "num_experts * sum over e of share[e] * probability[e], over the tokens of the mask; share[e] = part of their top_k "
            "assignments each that chose e; probability[e] = mean of softmax(router_logits)[e]; 0 where there is no token"
        ),
        source="Switch Transformers (arXiv:2101.03961) eq. 4 to 6; transformers' load_balancing_loss_func is top_k times it",
        reference=moe_layers.load_balancing_loss,
        inputs=(LOGITS, IDS, MASK),
        outputs=(Output("loss", (), dtype="float32", differentiable=True),),
        options=(),
        batch="num_tokens",
        parameters=loss_parameters,
        landmarks=(
            loss_sizes(33, 8, 2),
            loss_sizes(100, 5, 3),
            loss_sizes(17, 300, 8),  # ids above 255
            loss_sizes(513, 513, 1),  # each of 512 programs goes on to a second tile of a token
            loss_sizes(17, 128, 8),  # Qwen3
        ),
        factors=(edges("num_tokens", 1, 2, 15, 16, 17, 33, 257), *LOSS_FACTORS[1:]),  # more than bfloat16 can count, or a byte
        build=loss_point,
        traits=BALANCE_TRAITS,
        regimes=BALANCE_REGIMES,
        cases=0.5,
        cost=balance_cost,
        workloads=LOSS_WORKLOADS,
        relabel=of_experts.shuffled,
        rejections=BALANCE_REJECTIONS,
        without=MEAN,
        implementations=(
            triton(),
            jax("jax-jit"),
        ),
    )


@row
def router_z_loss() -> Contract:
    """The row of `moe_layers.router_z_loss`."""
    return Contract(
        name="moe_layers.router_z_loss",
        summary="How large the logits of a router are.",
        formula="mean over the tokens of the mask of logsumexp(router_logits) ** 2; 0 where there is no token",
        source="ST-MoE (arXiv:2202.08906) equation 5",
        reference=moe_layers.router_z_loss,
        inputs=(LOGITS, MASK),
        outputs=(Output("loss", (), dtype="float32", differentiable=True),),
        options=(),
        batch="num_tokens",
        parameters=loss_parameters,
        landmarks=(
            loss_sizes(33, 8, 2),
            loss_sizes(100, 5, 3),
            loss_sizes(17, 300, 8),
            loss_sizes(513, 513, 1),
            loss_sizes(17, 128, 8),
        ),
        factors=LOSS_FACTORS[:2],  # it has no top_k
        build=lambda num_tokens, num_experts: loss_sizes(num_tokens, num_experts, 1),
        traits=MASK_TRAITS,
        regimes=Z_REGIMES,
        cases=0.5,
        cost=z_cost,
        workloads=LOSS_WORKLOADS,
        formulas=(_log_of_sum,),
        relabel=of_experts.shuffled,
        rejections=Z_REJECTIONS,
        without=MEAN,
        implementations=(
            triton(),
            jax("jax-jit"),
        ),
    )


MIXTRAL_8X7B = "mistralai/Mixtral-8x7B-v0.1 config.json"
MIXTRAL_8X22B = "mistralai/Mixtral-8x22B-v0.1 config.json"
GATE, W13, W2 = "gate.weight", "experts.gate_up_proj", "experts.down_proj"


def mixtral_state(parameters: Parameters) -> dict[str, Input]:
    """The parameters of one layer."""
    return {
        GATE: Input(GATE, ("num_experts", "hidden_size")),
        W13: Input(W13, ("num_experts", "two_intermediate_sizes", "hidden_size")),
        W2: Input(W2, ("num_experts", "hidden_size", "intermediate_size")),
    }


def mixtral_cost(parameters: Parameters, itemsize: int) -> Cost:
    """That of the experts, whose weights stay inside, and one more product, whose result is written in float32."""
    inside, logits = of_experts.cost(parameters, itemsize), parameters["num_tokens"] * parameters["num_experts"]
    gate = itemsize * parameters["num_experts"] * parameters["hidden_size"]
    topk_weights = 4 * parameters["num_tokens"] * parameters["top_k"]
    return Cost(inside.flops + 2.0 * logits * parameters["hidden_size"], inside.bytes + gate + 4 * logits - topk_weights)


def balance_cost(parameters: Parameters, itemsize: int) -> Cost:
    """Logits, ids (8 bytes) and mask (1) are read once; about 10 operations a logit."""
    tokens, logits = parameters["num_tokens"], parameters["num_tokens"] * parameters["num_experts"]
    return Cost(10.0 * logits, float(itemsize * logits + (8 * parameters["top_k"] + 1) * tokens))


def z_cost(parameters: Parameters, itemsize: int) -> Cost:
    """Logits and mask (1 byte) are read once; about 10 operations a logit."""
    logits = parameters["num_tokens"] * parameters["num_experts"]
    return Cost(10.0 * logits, float(itemsize * logits + parameters["num_tokens"]))


def loss_sizes(num_tokens: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the losses' input space."""
    return {"num_tokens": num_tokens, "num_experts": num_experts, "top_k": top_k}


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
    Trait("int32", "dtype of topk_ids", dtypes={"topk_ids": "int32"}),
    Trait("each expert in turn", "values of topk_ids", _in_turn, fits=_each_expert),
)


def _gate_in_turn(tensors: Tensors) -> Tensors:
    """Each expert is the first choice of some token: the first two values of each token point to its expert's row of the gate."""
    tokens, gate = tensors["hidden_states"].clone(), tensors[f"state/{GATE}"].clone()
    angles = 2 * math.pi * torch.arange(len(gate)) / len(gate)
    directions = torch.stack([angles.cos(), angles.sin()], 1).to(torch.float64)
    gate[:, :2], tokens[:, :2] = 16 * directions, directions[torch.arange(len(tokens)) % len(gate)]
    gate[:, 2:] = gate[:, 2:].sign() / 64
    return {"hidden_states": tokens, f"state/{GATE}": gate}


def _layer(tensors: Tensors, gate: torch.Tensor) -> Tensors:
    """The tokens and the weights of experts' tensors, and a gate in the place of their routing."""
    state = {f"state/{GATE}": gate, f"state/{W13}": tensors["w13"], f"state/{W2}": tensors["w2"]}
    return {"hidden_states": tensors["hidden_states"], **state}


def _gate(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Logits with a deviation of 2, for tokens of unit variance."""
    width = parameters["hidden_size"]
    return 2 * draw.normal(parameters["num_experts"], width) * width**-0.5


def _gated(make: Callable[[Draw, Parameters], Tensors]) -> Callable[[Draw, Parameters], Tensors]:
    return lambda draw, parameters: _layer(make(draw, parameters), _gate(draw, parameters))


def skewed(draw: Draw, parameters: Parameters) -> Tensors:
    """All tokens on the same experts, or a tile's rows of them, one less or one more, and the others on the opposite ones."""
    tensors, tokens = of_experts.dithered(draw, parameters), parameters["num_tokens"]
    edges = [tile + step for tile in of_experts.TILES for step in (-1, 0, 1) if tile + step < tokens]
    one_side = [tokens, *edges][int(draw.integers(0, 1 + len(edges), 1))]
    tensors["hidden_states"][:, 0] = torch.where(torch.arange(tokens) < one_side, 1.0, -1.0)
    gate = torch.zeros(parameters["num_experts"], parameters["hidden_size"], dtype=torch.float64)
    gate[:, 0] = draw.permutation(parameters["num_experts"]) / 2
    return _layer(tensors, gate)


def tied(draw: Draw, parameters: Parameters) -> Tensors:
    """Half of the experts have the same row of the gate, the others have zeros."""
    same, gate = draw.permutation(parameters["num_experts"]) % 2, _gate(draw, parameters)
    return _layer(of_experts.dithered(draw, parameters), same[:, None] * gate[:1])


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits of 0 and -256, a power of two of them 0, and that many or more chosen: weights are powers of two, or 0.

    Which are 0 depends on a token's second value, 0 or 1. The rest is the experts' lattice.
    """
    experts, width = parameters["num_experts"], parameters["hidden_size"]
    favoured = draw.distinct_rows(2, 2 ** int(math.log2(parameters["top_k"])), experts)
    logits = torch.full((2, experts), -256.0, dtype=torch.float64).scatter(1, favoured, 0.0)
    gate = torch.zeros(experts, width, dtype=torch.float64)
    gate[:, 0] = logits[0]  # the lattice's tokens all begin with 1
    gate[:, 1:2] = (logits[1] - logits[0])[:, None]
    return _layer(of_experts.lattice(draw, parameters), gate)


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


def _set(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Mapping[str, Any]]:
    """Replaces one argument by a function of itself."""
    return lambda call: {name: change(call[name])}


MIXTRAL_REJECTIONS = (
    Rejection("tokens of another width", "hidden_size", _set("hidden_states", lambda each: torch.cat([each, each], 1))),
    Rejection("top_k above num_experts", "top_k", lambda call: {"top_k": call[f"state/{GATE}"].shape[0] + 1}),
    Rejection("top_k of zero", "top_k", lambda call: {"top_k": 0}),
    *(Rejection(f"{name} of fewer experts", name, _set(f"state/{name}", lambda each: each[:-1])) for name in (W13, W2)),
    Rejection("gate of another width", GATE, _set(f"state/{GATE}", lambda each: each[:, :-1])),
    Rejection("w13 with an odd number of rows", W13, _set(f"state/{W13}", lambda each: each[:, :-1])),
    Rejection("w2 of another width", W2, _set(f"state/{W2}", lambda each: each[:, :-1])),
)
Z_REJECTIONS = (Rejection("no experts", "router_logits", _set("router_logits", lambda each: each[:, :0])),)
BALANCE_REJECTIONS = (
    *Z_REJECTIONS,
    Rejection("no ids", "topk_ids", _set("topk_ids", lambda each: each[:, :0])),
)


def _logits(hidden_states: torch.Tensor, state: Tensors) -> torch.Tensor:
    return hidden_states @ state[GATE].mT


def _scores(hidden_states: torch.Tensor, state: Tensors, **_: Any) -> torch.Tensor:
    return torch.softmax(_logits(hidden_states, state), -1)


def _softmax_of_chosen(hidden_states: torch.Tensor, state: Tensors, *, top_k: int) -> tuple[torch.Tensor, ...]:
    """The commonest other way: the softmax of the chosen logits is the renormalized softmax of all."""
    router_logits = _logits(hidden_states, state)
    ids = router_logits.topk(top_k, -1).indices
    topk_weights = router_logits.gather(-1, ids).softmax(-1)
    return experts.fused_swiglu(hidden_states, state[W13], state[W2], topk_weights, ids), router_logits, ids


def _log_of_sum(router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """What kernels do: a logsumexp is the highest logit plus a logarithm, which may cancel."""
    logits = torch.where(attention_mask[:, None], router_logits, 0)
    highest = logits.amax(-1, keepdim=True).detach()
    z = highest[:, 0] + (logits - highest).exp().sum(-1).log()
    return torch.where(attention_mask, z, 0).square().sum() / attention_mask.sum().clamp(min=1)


LOGITS = Input("router_logits", ("num_tokens", "num_experts"), differentiable=True)
IDS = Input("topk_ids", ("num_tokens", "top_k"), dtype="int64", indexes="num_experts")
MASK = Input("attention_mask", ("num_tokens",), dtype="bool")
MEAN = {
    "batch_invariance": "a mean depends on all of its batch",
    "nan_containment": "a mean has no examples; padding of NaN is in the regime special",
}
LOSS_WORKLOADS = (
    Workload("mixtral-8x7b/prefill-4096", loss_sizes(4096, 8, 2), MIXTRAL_8X7B),
    Workload("qwen3-30b-a3b/prefill-4096", loss_sizes(4096, 128, 8), "Qwen/Qwen3-30B-A3B config.json"),
    Workload("olmoe-1b-7b/train-65536", loss_sizes(65536, 64, 8), "allenai/OLMoE-1B-7B-0924 config.json; 16 sequences of 4096"),
)
