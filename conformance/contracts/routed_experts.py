"""What the contracts of routed experts share: sizes, factors, traits, and the values that tokens, weights and routes have."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.engine.contract import Input, Output, Regime, Rejection, Workload
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_count, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import Implementation, distributed
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.shardings import Blocks, Sharding
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors

Make = Callable[[Draw, Parameters], Tensors]

TILES = (16, 32, 64, 128)  # block sizes that grouped kernels use: regimes put group sizes just below, at and above one
WEIGHTS = ("w13", "w1", "b13", "b1", "w2", "b2")  # what an expert has of its own
SHARDINGS: dict[str, Sharding] = {
    "expert_parallel": {"num_tokens": "uneven", "num_experts": "even"},
    "replicated_tokens": {"num_experts": "even"},
    "tensor_parallel": {"intermediate_size": "even", "two_intermediate_sizes": Blocks("intermediate_size")},
}
TENSOR_PARALLEL_PAIRS: Sharding = {
    "intermediate_size": "even",
    "two_intermediate_sizes": Blocks("intermediate_size", interleaved=True),
}
ON_RANKS: dict[str, Any] = {"dtypes": ("float32", "bfloat16"), "devices": DEVICES, "world_sizes": (1, 2, 4)}
EXPERT_PARALLEL = distributed("expert-parallel", **ON_RANKS)

HIDDEN_STATES = Input("hidden_states", ("num_tokens", "hidden_size"), differentiable=True)
W13 = Input("w13", ("num_experts", "two_intermediate_sizes", "hidden_size"), differentiable=True)
W2 = Input("w2", ("num_experts", "hidden_size", "intermediate_size"), differentiable=True)
B2 = Input("b2", ("num_experts", "hidden_size"), differentiable=True)
ROUTES = (
    Input("topk_weights", ("num_tokens", "top_k"), dtype="float32", differentiable=True),
    Input("topk_ids", ("num_tokens", "top_k"), dtype="int64", indexes="num_experts"),
)
OUTPUTS = (Output("hidden_states_out", ("num_tokens", "hidden_size"), differentiable=True),)


def tensor_parallel(operation: str) -> Implementation:
    """The row of an operation's tensor-parallel version."""
    return distributed("tensor-parallel", f"experts_tensor_parallel:{operation}", sharding="tensor_parallel", **ON_RANKS)


def flops(parameters: Parameters, matrices: int = 3) -> float:
    """So many matrix products of hidden by intermediate size a routed row."""
    routed = parameters["num_tokens"] * parameters["top_k"]
    return 2.0 * matrices * routed * parameters["hidden_size"] * parameters["intermediate_size"]


def moved(parameters: Parameters, itemsize: int, matrices: int = 3, biases: int = 0) -> float:
    """Tokens read and written once, the weights of the experts in use read once, and what each row's expert and weight are.

    Args:
        matrices: Of an expert, of hidden by intermediate size.
        biases: Elements of an expert's biases.
    """
    tokens, width = parameters["num_tokens"], parameters["hidden_size"]
    routed = tokens * parameters["top_k"]
    used = min(parameters["num_experts"], routed)
    of_expert = matrices * width * parameters["intermediate_size"] + biases
    return itemsize * (used * of_expert + 2 * tokens * width) + 12.0 * routed


def sizes(num_tokens: int, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> dict[str, Any]:
    """One point of the input space."""
    return {
        "num_tokens": num_tokens,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "two_intermediate_sizes": 2 * intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
    }


# tokens at a time; training is prefill with a backward pass, and benchmarks measure both directions of all
USES = {"decode-1": 1, "decode-64": 64, "prefill-4096": 4096, "prefill-16384": 16384, "train-8192": 8192, "train-32768": 32768}


def published(
    model: str, shape: tuple[int, int, int, int], source: str, sized: Callable[..., Parameters] = sizes
) -> tuple[Workload, ...]:
    """What a public model's experts [hidden_size, intermediate_size, num_experts, top_k] are used for."""
    return tuple(Workload(f"{model}/{use}", sized(num_tokens, *shape), source) for use, num_tokens in USES.items())


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes around block sizes, with tails; small enough for an interpreter."""
    experts = draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    return sizes(
        num_tokens=draw(st.sampled_from([1, 2, 3, 7, 15, 16, 17, 24, 33])),
        hidden_size=draw(st.sampled_from([1, 8, 16, 31, 64, 65, 100])),
        intermediate_size=draw(st.sampled_from([1, 8, 17, 32, 64, 70])),
        num_experts=experts,
        top_k=draw(st.integers(1, min(experts, 4))),
    )


FACTORS = (
    edges("num_tokens", 1, 2, 15, 16, 17),
    kinds("hidden_size", kind_of_width, 1, 16, 31, 24, 100),
    kinds("intermediate_size", kind_of_width, 1, 16, 17, 24, 70),
    kinds("num_experts", kind_of_count, 1, 2, 4, 8, 3, 7),
    edges("top_k", 1, 2, 3, 4),
)


def point(num_tokens: int, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    return sizes(num_tokens, hidden_size, intermediate_size, num_experts, top_k) if top_k <= num_experts else None


LANDMARKS = (
    sizes(33, 100, 70, 5, 2),  # tails everywhere
    sizes(5, 40, 24, 32, 4),  # most experts without tokens
    sizes(100, 20, 24, 3, 2),  # several tiles of rows for an expert, whatever the tile
    sizes(6, 320, 96, 2, 1),  # long sums: an accumulator that is not float32 shows
    sizes(260, 16, 32, 2, 2),  # gradients of weights over many tiles of rows
)
IDS_ABOVE_255 = sizes(3, 8, 8, 257, 3)
MANY_TILES = sizes(264, 144, 80, 2, 1)  # all that there are full, and several along each axis: a grid may be persistent
APPROXIMATE = either("approximate", "none", "tanh")


def dealt(points: tuple[dict[str, Any], ...], *options: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The points, each with the next of the choices of options."""
    return tuple({**point, **options[place % len(options)]} for place, point in enumerate(points))


def _some(tensor: torch.Tensor, rows: slice, columns: slice, value: torch.Tensor | float) -> torch.Tensor:
    changed = tensor.clone()
    changed[rows, columns] = value
    return changed


def _in_turn(tensors: Tensors) -> Tensors:
    """Each expert is the first choice of some token."""
    ids, experts = tensors["topk_ids"], len(tensors["w2"])
    return {"topk_ids": (torch.arange(len(ids))[:, None] + torch.arange(ids.shape[1])) % experts}


INT32 = Trait("int32", "dtype of topk_ids", dtypes={"topk_ids": "int32"})
# the number of experts itself may be none of them: as 256, what a kernel pads ids with is expert 0
UINT8 = Trait("uint8", "dtype of topk_ids", dtypes={"topk_ids": "uint8"}, fits=lambda sizes: sizes["num_experts"] <= 256)
TRAITS = (
    INT32,
    Trait("each expert in turn", "values of topk_ids", _in_turn, fits=lambda sizes: sizes["num_tokens"] >= sizes["num_experts"]),
    Trait(
        "one twice in a row",
        "values of topk_ids",
        lambda tensors: {"topk_ids": _some(tensors["topk_ids"], slice(0, None, 2), slice(1, 2), tensors["topk_ids"][::2, :1])},
        fits=lambda sizes: sizes["top_k"] > 1,
    ),
    Trait(
        "some 0",
        "topk_weights",
        lambda tensors: {"topk_weights": _some(tensors["topk_weights"], slice(0, None, 2), slice(0, 1), 0.0)},
    ),
    Trait(
        "a row of 0",
        "topk_weights",
        lambda tensors: {"topk_weights": _some(tensors["topk_weights"], slice(-1, None), slice(None), 0.0)},
    ),
    Trait("negative", "topk_weights", lambda tensors: {"topk_weights": -tensors["topk_weights"].abs()}),
)


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens and weights of unit variance, of experts that have a gate."""
    tokens = draw.normal(parameters["num_tokens"], parameters["hidden_size"])
    return {"hidden_states": tokens, **gated_weights(draw, parameters), **routing(draw, parameters)}


def gated_weights(draw: Draw, parameters: Parameters) -> Tensors:
    """Random weights scaled by fan-in, so that activations have unit variance."""
    experts, width, inner = (parameters[name] for name in ("num_experts", "hidden_size", "intermediate_size"))
    return {
        "w13": draw.normal(experts, 2 * inner, width) * width**-0.5,
        "w2": draw.normal(experts, width, inner) * inner**-0.5,
    }


def routing(draw: Draw, parameters: Parameters) -> Tensors:
    """Distinct experts for each token, positive weights that sum to about 1."""
    tokens, top_k = parameters["num_tokens"], parameters["top_k"]
    return {
        "topk_weights": (0.2 + draw.uniform(tokens, top_k)) / top_k,
        "topk_ids": draw.distinct_rows(tokens, top_k, parameters["num_experts"]),
    }


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Integers, of which every partial sum is exact in any order, and which tell a low-precision accumulator.

    Each gate is 41, where the sigmoid, and what a GELU multiplies by, round to 1; up values are sums of at most six ones; w2
    is sparse and 0 or 1, or of both signs.
    """
    experts, width, inner = (parameters[name] for name in ("num_experts", "hidden_size", "intermediate_size"))
    hidden = lattice_tokens(draw, parameters)
    w13 = torch.zeros(experts, 2 * inner, width, dtype=torch.float64)
    w13[:, :inner, 0] = 41
    w13[:, inner:] = sparse(draw, experts * inner, width, 6).view(experts, inner, width)
    w2 = lattice_down(draw, experts, width, inner)
    return {"hidden_states": hidden, "w13": w13, "w2": w2, **lattice_routing(draw, parameters)}


def lattice_tokens(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Tokens of 0 and 1, each of which begins with 1."""
    hidden = draw.integers(0, 2, parameters["num_tokens"], parameters["hidden_size"]).to(torch.float64)
    hidden[:, 0] = 1
    return hidden


def lattice_down(draw: Draw, experts: int, width: int, inner: int) -> torch.Tensor:
    """Matrices of at most 16 ones in a row, or as many of both signs."""
    w2 = sparse(draw, experts * width, inner, 16).view(experts, width, inner)
    signs = 1 - 2 * draw.integers(0, 2, *w2.shape) if draw.uniform(1).item() < 0.5 else torch.ones_like(w2)
    return w2 * signs


def lattice_routing(draw: Draw, parameters: Parameters) -> Tensors:
    """Distinct experts for each token; weights are powers of two."""
    powers = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    drawn = powers[draw.integers(0, 3, parameters["num_tokens"], parameters["top_k"])]
    return {**routing(draw, parameters), "topk_weights": drawn}


def sparse(draw: Draw, rows: int, columns: int, ones: int) -> torch.Tensor:
    """`[rows, columns]` of zeros with at most `ones` ones in each row."""
    positions = draw.integers(0, columns, rows, min(ones, columns))
    return torch.zeros(rows, columns, dtype=torch.float64).scatter(1, positions, 1.0)


def skewed(make: Make) -> Make:
    """All tokens on one expert, or experts without tokens, or one expert with a tile's rows, one less, one more."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = make(draw, parameters)
        tokens, experts = parameters["num_tokens"], parameters["num_experts"]
        favourite, kind = int(draw.integers(0, experts, 1)), int(draw.integers(0, 3, 1))
        first = torch.full((tokens,), favourite) if kind == 0 else torch.full((tokens,), (favourite + 1) % experts)
        if kind == 1:
            edges = [tile + step for tile in TILES for step in (-1, 0, 1) if tile + step <= tokens] or [tokens]
            first[: edges[int(draw.integers(0, len(edges), 1))]] = favourite
        order = torch.stack([torch.cat([each[None], (each + 1 + torch.arange(experts - 1)) % experts]) for each in first])
        return tensors | {"topk_ids": order[:, : parameters["top_k"]]}

    return made


def repeated(make: Make) -> Make:
    """Experts chosen twice in a row; every third token chooses one alone, as often as it may: expert 0, or the last."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tokens, experts, top_k = (parameters[name] for name in ("num_tokens", "num_experts", "top_k"))
        ids = draw.integers(0, experts, tokens, top_k)
        ids[:, 1:2] = ids[:, :1]
        ids[::3] = (experts - 1) * draw.integers(0, 2, 1)
        return make(draw, parameters) | {"topk_ids": ids}

    return made


def cancelling(make: Make) -> Make:
    """Sums of large terms of both signs; magnitudes from 2^-4 to 2^4 over the rows."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = make(draw, parameters)
        scale = torch.exp2(draw.integers(-4, 5, parameters["num_tokens"], 1).to(torch.float64))
        alternating = 1 - 2 * (torch.arange(parameters["intermediate_size"]) % 2)
        return tensors | {"hidden_states": tensors["hidden_states"] * scale, "w2": tensors["w2"].abs() * alternating}

    return made


def special(make: Make) -> Make:
    """A token of NaN and one with an infinity; where most tokens are of other experts, the last one's weights are NaN, and one
    element of the first one's first bias: a gate, whose up value is a number."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = make(draw, parameters)
        tensors["hidden_states"][parameters["num_tokens"] // 2] = torch.nan
        tensors["hidden_states"][-1, 0] = torch.inf
        if parameters["num_experts"] > 2 * parameters["top_k"]:
            for name in WEIGHTS:
                if name in tensors:
                    tensors[name][-1] = torch.nan
                if name in tensors and name in ("b1", "b13"):
                    tensors[name][0, 0] = torch.nan
        return tensors

    return made


def tiny(make: Make, down: int) -> Make:
    """Results among the subnormal numbers of float16, not below them all: what an expert gets is scaled by 2^-6, what it returns
    by 2^down on top."""

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = make(draw, parameters)
        powers = {"hidden_states": -6, "b1": -6, "b13": -6, "w2": down, "b2": down - 6}
        return tensors | {name: tensors[name] * 2.0**power for name, power in powers.items() if name in tensors}

    return made


def regimes(make: Make, down: int) -> tuple[Regime, ...]:
    """Those that all routed experts have, from the main one on."""
    return (
        Regime("dithered", make),
        Regime("skew", skewed(make)),
        Regime("repeated ids", repeated(make)),
        Regime("adversarial", cancelling(make), "worst element"),
        # what underflows depends on where weights are applied
        Regime("denormals", tiny(make, down), "worst element", differentiable=False),
        Regime("special", special(make), "worst element", differentiable=False),
    )


def gelu_by_sums(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """A GELU by 1 + erf or 1 + tanh, as libraries have it: the sums cancel where x is far below 0."""
    if approximate == "tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


IDS_FOR_MORE_TOKENS = Rejection(
    "ids for more tokens",
    "topk_ids",
    lambda call: {name: torch.cat([call[name], call[name][:1]]) for name in ("topk_ids", "topk_weights")},
)
ODD_ROWS = Rejection("w13 with an odd number of rows", "w13", changed("w13", lambda each: each[..., :-1, :]))


def shuffled(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Any order of the experts."""
    return draw.permutation(parameters["num_experts"])
