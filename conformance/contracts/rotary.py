"""Contracts of rotary position embeddings."""

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.engine.contract import Contract, Derived, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import compiled, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed, of_another_dtype
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import rotary


@row
def rotate() -> Contract:
    """The row of `rotary.rotate`."""
    return Contract(
        name="rotary.rotate",
        summary="Each pair of features of each head turns by the angle of its token.",
        formula="(x, y) becomes (x cos - y sin, y cos + x sin)",
        source="Su et al. 2021 (arXiv:2104.09864), equation 34; pairs as in black-forest-labs/flux and EleutherAI/gpt-neox",
        reference=rotary.rotate,
        inputs=(Input("heads", HEADS_SHAPE, differentiable=True), *ANGLES),
        outputs=(Output("rotated", HEADS_SHAPE, differentiable=True),),
        options=("pairs",),
        batch="batch_size",
        parameters=parameters,
        landmarks=(
            sizes(2, 3, 17, 72, "half-split"),  # tails everywhere
            sizes(1, 2, 33, 128, "interleaved"),  # Flux
            sizes(1, 9, 4, 128, "half-split"),  # Qwen3
            sizes(2, 1, 3, 256, "interleaved"),
        ),
        factors=FACTORS,
        build=sizes,
        traits=TRAITS,
        regimes=(
            Regime("dithered", lambda draw, parameters: {"heads": _heads(draw, parameters), **_angles(draw, parameters)}),
            Regime("adversarial", _cancelling, "worst element"),
            Regime("special", _with_a_bad_head, "worst element", differentiable=False),
        ),
        flops=lambda parameters: 3.0 * math.prod(parameters[each] for each in HEADS_SHAPE),
        workloads=(
            Workload("llama-3-8b/prefill-4096", sizes(1, 32, 4096, 128), "meta-llama/Meta-Llama-3-8B config.json: queries"),
            Workload("llama-3-8b/decode-64", sizes(64, 32, 1, 128), "meta-llama/Meta-Llama-3-8B config.json: queries"),
            Workload("two-cores/256-tokens", sizes(1, 32, 256, 128), "a size for a CPU, Llama 3 8B"),
        ),
        cases=0.3,
        rejections=(
            Rejection("heads of an odd size", "heads", changed("heads", lambda each: each[..., 1:])),
            *_bad_angles(),
        ),
        implementations=OURS,
    )


@row
def qk_norm_rotary() -> Contract:
    """The row of `rotary.qk_norm_rotary`."""
    return Contract(
        name="rotary.qk_norm_rotary",
        summary="Each head of queries and of keys is divided by its root mean square, scaled, and turned by its token's angles.",
        formula="(x, y) becomes (x' cos - y' sin, y' cos + x' sin),  x' = x / sqrt(mean over the head of x**2 + eps) * weight",
        source="black-forest-labs/flux layers.py, QKNorm, and math.py, apply_rope; Qwen3 (arXiv:2505.09388), section 2",
        reference=rotary.qk_norm_rotary,
        inputs=(
            Input("query", HEADS_SHAPE, differentiable=True),
            Input("key", KEYS_SHAPE, differentiable=True),
            Input("query_weight", ("head_size",), differentiable=True),
            Input("key_weight", ("head_size",), differentiable=True),
            *ANGLES,
        ),
        outputs=(
            Output("turned_query", HEADS_SHAPE, differentiable=True),
            Output("turned_key", KEYS_SHAPE, differentiable=True),
        ),
        options=("eps", "pairs"),
        batch="batch_size",
        parameters=grouped_parameters,
        landmarks=(
            grouped(2, 3, 1, 17, 72, "half-split"),  # tails everywhere
            grouped(1, 2, 2, 33, 128, "interleaved"),  # Flux
            grouped(1, 4, 1, 5, 128, "half-split"),  # Qwen3
            grouped(3, 9, 2, 9, 256, "interleaved"),  # more blocks than programs that add up gradients of weights
        ),
        factors=(*FACTORS, edges("num_key_heads", 1, 2, 3), either("eps", 1e-6, 1e-5)),
        build=grouped,
        traits=(*TRAITS, Trait("1, as at the start of a training", "weights", _all(1.0, "query_weight", "key_weight"))),
        regimes=(
            Regime("dithered", lambda draw, parameters: _normed(draw, parameters, _heads)),
            Regime("constants", lambda draw, parameters: _normed(draw, parameters, _near_zero)),
            Regime("adversarial", lambda draw, parameters: _normed(draw, parameters, _with_an_outlier), "worst element"),
            Regime("special", _with_bad_heads, "worst element", differentiable=False),
        ),
        flops=lambda parameters: 7.0 * _elements(parameters),
        workloads=(
            Workload("flux-dev/1024px", grouped(1, 24, 24, 4608, 128, "interleaved"), FLUX),
            Workload("flux-dev/512px-batch-4", grouped(4, 24, 24, 1536, 128, "interleaved"), FLUX),
            Workload("qwen3-8b/prefill-4096", grouped(1, 32, 8, 4096, 128), QWEN3),
            Workload("qwen3-8b/block-of-4-batch-32", grouped(32, 32, 8, 4, 128), f"{QWEN3}; blocks as of SDAR"),
            Workload("two-cores/flux-256px", grouped(1, 24, 24, 768, 128, "interleaved"), f"a size for a CPU; {FLUX}"),
        ),
        cases=0.3,
        rejections=(
            Rejection("queries of an odd size", "query", changed("query", lambda each: each[..., 1:])),
            Rejection("keys of another dtype", "key", changed("key", of_another_dtype)),
            Rejection("a weight of another dtype", "key_weight", changed("key_weight", of_another_dtype)),
            *_bad_angles(),
            Rejection("eps of 0", "eps", lambda call: {"eps": 0.0}),
        ),
        implementations=OURS,
    )


def sizes(batch_size: int, num_heads: int, num_tokens: int, head_size: int, pairs: str = "half-split") -> dict[str, Any]:
    """One point of the input space."""
    return {
        "batch_size": batch_size, "num_heads": num_heads, "num_tokens": num_tokens, "head_size": head_size, "pairs": pairs
    }  # fmt: skip


def grouped(
    batch_size: int,
    num_heads: int,
    num_key_heads: int,
    num_tokens: int,
    head_size: int,
    pairs: str = "half-split",
    eps: float = 1e-6,
) -> dict[str, Any]:
    """One point of the input space of queries and keys."""
    return {**sizes(batch_size, num_heads, num_tokens, head_size, pairs), "num_key_heads": num_key_heads, "eps": eps}


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes around block sizes, with tails."""
    return sizes(
        batch_size=draw(st.sampled_from([1, 2, 3])),
        num_heads=draw(st.sampled_from([1, 2, 5, 9])),
        num_tokens=draw(st.sampled_from([1, 2, 4, 9, 16, 17, 33])),
        head_size=draw(st.sampled_from([2, 16, 18, 40, 64, 72])),
        pairs=draw(st.sampled_from(["interleaved", "half-split"])),
    )


@st.composite
def grouped_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """As `parameters`, with heads of keys."""
    num_key_heads, eps = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1e-6, 1e-5]))
    return {**draw(parameters()), "num_key_heads": num_key_heads, "eps": eps}


FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_heads", 1, 2, 9),
    edges("num_tokens", 1, 2, 15, 16, 17, 33),
    kinds("head_size", kind_of_width, 16, 18, 64, 72),
    either("pairs", "interleaved", "half-split"),
)


def _all(value: float, *names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: torch.full_like(tensors[name], value) for name in names}


def _turned_by(angle: float) -> Callable[[Tensors], Tensors]:
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return lambda tensors: {**_all(cos, "cos")(tensors), **_all(sin, "sin")(tensors)}


TRAITS = (
    Trait("0, as of text in Flux", "angles", _turned_by(0)),
    Trait("a quarter turn", "angles", _turned_by(math.pi / 2)),
)


def _heads(draw: Draw, parameters: Parameters, heads: str = "num_heads") -> torch.Tensor:
    return draw.normal(parameters["batch_size"], parameters[heads], parameters["num_tokens"], parameters["head_size"])


def _angles(draw: Draw, parameters: Parameters) -> Tensors:
    angles = 2 * math.pi * draw.uniform(parameters["num_tokens"], parameters["head_size"] // 2)
    return {"cos": angles.cos(), "sin": angles.sin()}


def _cancelling(draw: Draw, parameters: Parameters) -> Tensors:
    """Angles by which the first example's first head turns onto the second features; heads of sizes from 2^-6 to 2^6."""
    powers = draw.integers(-6, 7, parameters["batch_size"], parameters["num_heads"], parameters["num_tokens"], 1)
    heads = _heads(draw, parameters) * torch.exp2(powers.to(torch.float64))
    first = heads[0, 0]
    if parameters["pairs"] == "interleaved":
        angles = torch.atan2(first[:, 0::2], first[:, 1::2])
    else:
        angles = torch.atan2(*first.chunk(2, -1))
    return {"heads": heads, "cos": angles.cos(), "sin": angles.sin()}


def _bad(heads: torch.Tensor) -> torch.Tensor:
    """A head with a NaN in one example, one with an infinity in the last."""
    heads[heads.shape[0] // 2, 0, 0, -1] = torch.nan
    heads[-1, -1, -1, 0] = torch.inf
    return heads


def _with_a_bad_head(draw: Draw, parameters: Parameters) -> Tensors:
    return {"heads": _bad(_heads(draw, parameters)), **_angles(draw, parameters)}


def _near_zero(draw: Draw, parameters: Parameters, heads: str = "num_heads") -> torch.Tensor:
    """Heads whose mean square is from a hundredth to a hundred times eps."""
    decades = 2 * draw.uniform(parameters["batch_size"], parameters[heads], parameters["num_tokens"], 1) - 1
    return _heads(draw, parameters, heads) * parameters["eps"] ** 0.5 * 10**decades


def _with_an_outlier(draw: Draw, parameters: Parameters, heads: str = "num_heads") -> torch.Tensor:
    """Heads of sizes from 2^-6 to 2^6, each with a feature a hundred times as large as the others."""
    shape = (parameters["batch_size"], parameters[heads], parameters["num_tokens"], 1)
    place = draw.integers(0, parameters["head_size"], *shape)
    made = _heads(draw, parameters, heads) * torch.exp2(draw.integers(-6, 7, *shape).to(torch.float64))
    return made.scatter(-1, place, 100 * made.gather(-1, place))


Heads = Callable[[Draw, Parameters, str], torch.Tensor]


def _normed(draw: Draw, parameters: Parameters, heads: Heads) -> Tensors:
    return {
        "query": heads(draw, parameters, "num_heads"),
        "key": heads(draw, parameters, "num_key_heads"),
        "query_weight": draw.normal(parameters["head_size"]),
        "key_weight": draw.normal(parameters["head_size"]),
        **_angles(draw, parameters),
    }


def _with_bad_heads(draw: Draw, parameters: Parameters) -> Tensors:
    tensors = _normed(draw, parameters, _heads)
    return {**tensors, "query": _bad(tensors["query"]), "key": _bad(tensors["key"])}


def _bad_angles() -> tuple[Rejection, ...]:
    return (
        Rejection("angles of whole heads", "cos", changed("cos", lambda each: torch.cat([each, each], -1))),
        Rejection("sines of fewer pairs", "sin", changed("sin", lambda each: each[:, 1:])),
        Rejection("cosines of half precision", "cos", changed("cos", lambda each: each.half())),
        Rejection("another kind of pairs", "pairs", lambda call: {"pairs": "neighbours"}),
    )


def _elements(parameters: Parameters) -> int:
    heads = parameters["num_heads"] + parameters["num_key_heads"]
    return int(parameters["batch_size"] * heads * parameters["num_tokens"] * parameters["head_size"])


HEADS_SHAPE = ("batch_size", "num_heads", "num_tokens", "head_size")
KEYS_SHAPE = ("batch_size", "num_key_heads", "num_tokens", "head_size")
PAIRS = Derived("head_size / 2", lambda parameters: int(parameters["head_size"]) // 2)
ANGLES = (Input("cos", ("num_tokens", PAIRS), dtype="float32"), Input("sin", ("num_tokens", PAIRS), dtype="float32"))
FLUX = "black-forest-labs/FLUX.1-dev transformer/config.json, and 512 tokens of text"
QWEN3 = "Qwen/Qwen3-8B config.json"

# on a CPU every kind of call takes seconds to compile: tests/test_compiled.py has a few
OURS = (triton(), compiled("compiled", devices=("cuda",)))
