"""Contracts of the MoE layers and of their losses."""

import math
from collections.abc import Callable
from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Selection, Workload, row
from gaugeblock.conformance.engine.factors import Trait
from gaugeblock.conformance.engine.implementation import jax, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
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
            Regime("special", _gated(of_experts.special(of_experts.dithered)), "worst element", differentiable=False),
            Regime("lattice", lattice, "exact", differentiable=False),
        ),
        cases=0.5,
        flops=mixtral_flops,
        moved=mixtral_moved,
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


def mixtral_flops(parameters: Parameters) -> float:
    """Those of the experts, and one more product."""
    gate = 2.0 * parameters["num_tokens"] * parameters["num_experts"] * parameters["hidden_size"]
    return of_experts.flops(parameters) + gate


def mixtral_moved(parameters: Parameters, itemsize: int) -> float:
    """As of the experts, whose weights stay inside; the gate; logits are written in float32."""
    gate = itemsize * parameters["num_experts"] * parameters["hidden_size"]
    logits = 4 * parameters["num_tokens"] * parameters["num_experts"]
    topk_weights = 4 * parameters["num_tokens"] * parameters["top_k"]
    return of_experts.moved(parameters, itemsize) + gate + logits - topk_weights


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


MIXTRAL_REJECTIONS = (
    Rejection("tokens of another width", "hidden_size", changed("hidden_states", lambda each: torch.cat([each, each], 1))),
    Rejection("top_k above num_experts", "top_k", lambda call: {"top_k": call[f"state/{GATE}"].shape[0] + 1}),
    Rejection("top_k of zero", "top_k", lambda call: {"top_k": 0}),
    *(Rejection(f"{name} of fewer experts", name, changed(f"state/{name}", lambda each: each[:-1])) for name in (W13, W2)),
    Rejection("gate of another width", GATE, changed(f"state/{GATE}", lambda each: each[:, :-1])),
    Rejection("w13 with an odd number of rows", W13, changed(f"state/{W13}", lambda each: each[:, :-1])),
    Rejection("w2 of another width", W2, changed(f"state/{W2}", lambda each: each[:, :-1])),
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
