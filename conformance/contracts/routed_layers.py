"""What the contracts of MoE layers share: sizes, factors, traits, bad calls, and the values of tokens, gates and experts.

Values are drawn under the names that all layers share (hidden_states, gate, w13, w2, shared_w13, …), and then take the names and
forms of a layer's parameters: `as_state`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.engine.contract import Input, Output, Regime, Rejection, Workload
from gaugeblock.conformance.engine.factors import Factor, Trait, kind_of_width, kinds
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.moe_states import BUFFERS, StateAxes

Make = Callable[[Draw, Parameters], Tensors]
Entries = Mapping[str, Callable[[Tensors], torch.Tensor]]
"""A layer's parameters by name, each made of what `Make` draws."""

USES = ("prefill-4096", "decode-64")
EXPERT_PARALLEL = {"expert_parallel": of_experts.SHARDINGS["expert_parallel"]}
GATE, W13, W2 = "gate.weight", "experts.gate_up_proj", "experts.down_proj"
ROUTED: Entries = {GATE: lambda drawn: drawn["gate"], W13: lambda drawn: drawn["w13"], W2: lambda drawn: drawn["w2"]}
"""Of a linear router and SwiGLU experts."""

OUTPUTS = (
    Output("hidden_states_out", ("num_tokens", "hidden_size"), differentiable=True),
    Output("router_logits", ("num_tokens", "num_experts"), dtype="float32", differentiable=True, whole=("num_experts",)),
    Output("topk_ids", ("num_tokens", "top_k"), dtype="int64", indexes="num_experts"),
)


def shared_entries(prefix: str) -> Entries:
    """Of a SwiGLU expert that all tokens pass."""
    return {
        f"{prefix}.gate_proj.weight": lambda drawn: drawn["shared_w13"].chunk(2)[0],
        f"{prefix}.up_proj.weight": lambda drawn: drawn["shared_w13"].chunk(2)[1],
        f"{prefix}.down_proj.weight": lambda drawn: drawn["shared_w2"],
    }


def inputs(axes_of: StateAxes) -> tuple[Input, ...]:
    """The tokens and the parameters of a layer; what is not an expert's is whole on every rank."""

    def leaf(name: str, axes: tuple[str, ...]) -> Input:
        shape = tuple(1 if axis == "one" else axis for axis in axes)
        dtype = "float32" if name in BUFFERS else "tested"
        return Input(name, shape, dtype=dtype, whole=() if name.startswith("experts.") else axes)

    leaves = {name: leaf(name, axes_of[name]) for name in sorted(axes_of)}
    buffers = BUFFERS & set(axes_of)
    return of_experts.HIDDEN_STATES, Input("state", differentiable=True, leaves=lambda parameters: leaves, buffers=buffers)


def with_shared(point: dict[str, Any] | None, shared_intermediate_size: int) -> dict[str, Any] | None:
    """A point of the input space with the width of the expert that all tokens pass."""
    return None if point is None else {**point, "shared_intermediate_size": shared_intermediate_size}


LANDMARKS = (
    of_experts.sizes(33, 40, 24, 5, 2),  # tails everywhere
    of_experts.sizes(70, 16, 32, 3, 2),  # several tiles of rows for an expert
    of_experts.sizes(5, 40, 24, 32, 4),  # most experts without tokens
    of_experts.sizes(17, 24, 16, 6, 1),  # one expert per token: renormalized its weight is 1, and no gradient reaches the gate
)
SHARED_WIDTH: Factor = kinds("shared_intermediate_size", kind_of_width, 1, 16, 17, 24, 70)


def gate_in_turn(entry: str = GATE) -> Trait:
    """Each expert is the first choice of some token: the first two values of each token point to its expert's row of the gate."""

    def change(tensors: Tensors) -> Tensors:
        tokens, gate = tensors["hidden_states"].clone(), tensors[f"state/{entry}"].clone()
        angles = 2 * math.pi * torch.arange(len(gate)) / len(gate)
        directions = torch.stack([angles.cos(), angles.sin()], 1).to(torch.float64)
        gate[:, :2], tokens[:, :2] = 16 * directions, directions[torch.arange(len(tokens)) % len(gate)]
        gate[:, 2:] = gate[:, 2:].sign() / 64
        return {"hidden_states": tokens, f"state/{entry}": gate}

    return Trait(
        "each expert in turn",
        "choice",
        change,
        fits=lambda sizes: sizes["num_tokens"] >= sizes["num_experts"] and sizes["hidden_size"] > 1,
    )


def as_state(make: Make, entries: Entries) -> Make:
    """What is drawn, under the names of a layer's parameters."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        drawn = make(draw, parameters)
        state = {f"state/{name}": entry(drawn) for name, entry in entries.items()}
        return {"hidden_states": drawn["hidden_states"], **state}

    return made


def regimes(
    entries: Entries, *, lattice: Make | None = None, more: Callable[[Make, bool], Make] | None = None
) -> tuple[Regime, ...]:
    """Those of a layer with a linear router.

    Args:
        entries: Its parameters.
        lattice: Values of which all sums are exact; by default those of a softmax router.
        more: From what draws the routed experts, and whether their sums are exact, to what draws the rest of the layer too.
    """
    add = more or (lambda make, exact: make)
    dithered = add(gated(of_experts.dithered), False)
    makes = {
        "dithered": dithered,
        "skew": skewed(dithered),
        "ties": tied(dithered),
        "special": of_experts.special(dithered),
        "lattice": add(lattice or softmax_lattice, True),
    }
    named = {name: as_state(make, entries) for name, make in makes.items()}
    return (
        Regime("dithered", named["dithered"]),
        Regime("skew", named["skew"]),
        Regime("ties", named["ties"], "worst element", differentiable=False),
        Regime("special", named["special"], "worst element", differentiable=False),
        Regime("lattice", named["lattice"], "exact", differentiable=False),
    )


def _gate(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Logits with a deviation of 2, for tokens of unit variance."""
    width = parameters["hidden_size"]
    return 2 * draw.normal(parameters["num_experts"], width) * width**-0.5


def gated(make: Make) -> Make:
    """A gate in the place of the experts' routing."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = {name: each for name, each in make(draw, parameters).items() if name not in ("topk_weights", "topk_ids")}
        return {**tensors, "gate": _gate(draw, parameters)}

    return made


def skewed(make: Make) -> Make:
    """All tokens on the same experts, or a tile's rows of them, one less or one more, and the others on the opposite ones."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors, tokens = make(draw, parameters), parameters["num_tokens"]
        edges = [tile + step for tile in of_experts.TILES for step in (-1, 0, 1) if tile + step < tokens]
        one_side = [tokens, *edges][int(draw.integers(0, 1 + len(edges), 1))]
        tensors["hidden_states"][:, 0] = torch.where(torch.arange(tokens) < one_side, 1.0, -1.0)
        gate = torch.zeros_like(tensors["gate"])
        gate[:, 0] = draw.permutation(parameters["num_experts"]) / 2
        return {**tensors, "gate": gate}

    return made


def tied(make: Make) -> Make:
    """Half of the experts have the same row of the gate, the others have zeros."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors, same = make(draw, parameters), draw.permutation(parameters["num_experts"]) % 2
        return {**tensors, "gate": same[:, None] * tensors["gate"][:1]}

    return made


def softmax_lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Logits of 0 and -256, a power of two of them 0, and that many or more chosen: weights are powers of two, or 0.

    Which are 0 depends on a token's second value, 0 or 1. The rest is the experts' lattice.
    """
    favoured = draw.distinct_rows(2, 2 ** int(math.log2(parameters["top_k"])), parameters["num_experts"])
    return sums_exact(draw, parameters, favoured, (0.0, -256.0))


def sums_exact(draw: Draw, parameters: Parameters, favoured: torch.Tensor, levels: tuple[float, float]) -> Tensors:
    """The experts' lattice, and two rows of logits, one of which each token has: the first level for its row of `favoured`, the
    second for others."""
    experts, width = parameters["num_experts"], parameters["hidden_size"]
    logits = torch.full((2, experts), levels[1], dtype=torch.float64).scatter(1, favoured, levels[0])
    gate = torch.zeros(experts, width, dtype=torch.float64)
    gate[:, 0] = logits[0]  # the lattice's tokens all begin with 1
    gate[:, 1:2] = (logits[1] - logits[0])[:, None]
    return {**gated(of_experts.lattice)(draw, parameters), "gate": gate}


def and_shared(make: Make, exact: bool) -> Make:
    """The expert that all tokens pass too."""
    of_one = of_experts.lattice if exact else of_experts.dithered

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        one = {"num_experts": 1, "top_k": 1, "intermediate_size": parameters["shared_intermediate_size"]}
        tensors, shared = make(draw, parameters), of_one(draw, {**parameters, **one})
        return {**tensors, "shared_w13": shared["w13"][0], "shared_w2": shared["w2"][0]}

    return made


def flops(parameters: Parameters) -> float:
    """Those of the routed experts, of the gate, and of the expert that all tokens pass, if there is one."""
    gate = 2.0 * parameters["num_tokens"] * parameters["num_experts"] * parameters["hidden_size"]
    shared = 6.0 * parameters["num_tokens"] * parameters["hidden_size"] * parameters.get("shared_intermediate_size", 0)
    return of_experts.flops(parameters) + gate + shared


def moved(parameters: Parameters, itemsize: int) -> float:
    """As of the experts, whose weights stay inside; the gate; the expert that all pass; logits are written in float32."""
    width = parameters["hidden_size"]
    weights = itemsize * width * (parameters["num_experts"] + 3 * parameters.get("shared_intermediate_size", 0))
    logits = 4 * parameters["num_tokens"] * parameters["num_experts"]
    topk_weights = 4 * parameters["num_tokens"] * parameters["top_k"]
    return of_experts.moved(parameters, itemsize) + weights + logits - topk_weights


def rejections(gate: str = GATE, w13: str = W13, w2: str = W2, *, rows: int = 1) -> tuple[Rejection, ...]:
    """Bad calls of every layer with matrices w13 and w2, whose rows lie along that axis."""

    def fewer_rows(each: torch.Tensor) -> torch.Tensor:
        return each.narrow(rows, 0, each.shape[rows] - 1)

    return (
        *any_rejections(gate, (w13, w2)),
        Rejection("w13 with an odd number of rows", w13, changed(f"state/{w13}", fewer_rows)),
        Rejection("w2 of another width", w2, changed(f"state/{w2}", fewer_rows)),
    )


def any_rejections(gate: str, experts: tuple[str, ...]) -> tuple[Rejection, ...]:
    """Bad calls of every layer: `experts` are the names of what each expert has one of."""
    return (
        Rejection("tokens of another width", "hidden_size", changed("hidden_states", lambda each: torch.cat([each, each], 1))),
        Rejection("top_k above num_experts", "top_k", lambda call: {"top_k": call[f"state/{gate}"].shape[0] + 1}),
        Rejection("top_k of zero", "top_k", lambda call: {"top_k": 0}),
        *(Rejection(f"{name} of fewer experts", name, changed(f"state/{name}", lambda each: each[:-1])) for name in experts),
        Rejection("gate of another width", gate, changed(f"state/{gate}", lambda each: each[:, :-1])),
    )


def workloads(
    model: str,
    shape: tuple[int, int, int, int],
    source: str,
    *,
    uses: tuple[str, ...] = ("prefill-4096", "decode-64"),
    **more: Any,
) -> tuple[Workload, ...]:
    """What a public model's layer [hidden_size, intermediate_size, num_experts, top_k] is used for."""
    return tuple(Workload(f"{model}/{use}", {**of_experts.sizes(of_experts.USES[use], *shape), **more}, source) for use in uses)
