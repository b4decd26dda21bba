"""Contracts of the experts."""

from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, kind_of_count, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import compiled, distributed, jax, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import DEVICES, Parameters, Tensors
from gaugeblock.reference.torch import experts


@row
def fused_swiglu() -> Contract:
    """The row of `experts.fused_swiglu`."""
    return Contract(
        name="experts.fused_swiglu",
        summary="Each token passes the SwiGLU experts that its router chose; their weighted outputs are added up.",
        formula=(
            "gate, up = halves of w13[e] @ hidden_states[t]; out[t] = sum over j of topk_weights[t, j] * w2[e] @ "
            "(silu(gate) * up), e = topk_ids[t, j]"
        ),
        source="Shazeer et al. 2017 (arXiv:1701.06538) equation 1; Shazeer 2020 (arXiv:2002.05202) eq. 6; weights as in vLLM",
        reference=experts.fused_swiglu,
        inputs=(
            Input("hidden_states", ("num_tokens", "hidden_size"), differentiable=True),
            Input("w13", ("num_experts", "two_intermediate_sizes", "hidden_size"), differentiable=True),
            Input("w2", ("num_experts", "hidden_size", "intermediate_size"), differentiable=True),
            Input("topk_weights", ("num_tokens", "top_k"), dtype="float32", differentiable=True),
            Input("topk_ids", ("num_tokens", "top_k"), dtype="int64", indexes="num_experts"),
        ),
        outputs=(Output("hidden_states_out", ("num_tokens", "hidden_size"), differentiable=True),),
        options=(),
        batch="num_tokens",
        parameters=parameters,
        landmarks=(
            sizes(33, 100, 70, 5, 2),  # tails everywhere
            sizes(5, 40, 24, 32, 4),  # most experts without tokens
            sizes(100, 20, 24, 3, 2),  # several tiles of rows for an expert, whatever the tile
            sizes(6, 320, 96, 2, 1),  # long sums: an accumulator that is not float32 shows
            sizes(260, 16, 32, 2, 2),  # gradients of weights over many tiles of rows
            sizes(17, 24, 16, 8, 2),  # Mixtral's experts
            sizes(3, 16, 8, 128, 8),  # Qwen3's
            sizes(3, 8, 8, 257, 3),  # ids above 255
        ),
        factors=FACTORS,
        build=point,
        traits=TRAITS,
        regimes=(
            Regime("dithered", dithered),
            Regime("skew", skewed),
            Regime("repeated ids", repeated),
            Regime("adversarial", cancelling, "worst element"),
            # what underflows depends on where weights are applied
            Regime("denormals", tiny, "worst element", differentiable=False),
            Regime("special", special, "worst element", differentiable=False),
            Regime("lattice", lattice, "exact", differentiable=False),
        ),
        flops=flops,
        moved=moved,
        workloads=(
            Workload("mixtral-8x7b/prefill-4096", sizes(4096, 4096, 14336, 8, 2), "mistralai/Mixtral-8x7B-v0.1 config.json"),
            Workload("qwen3-30b-a3b/prefill-4096", sizes(4096, 2048, 768, 128, 8), "Qwen/Qwen3-30B-A3B config.json"),
            Workload("deepseek-v3/prefill-4096", sizes(4096, 7168, 2048, 256, 8), "deepseek-ai/DeepSeek-V3 config.json"),
            Workload("olmoe-1b-7b/prefill-4096", sizes(4096, 2048, 1024, 64, 8), "allenai/OLMoE-1B-7B-0924 config.json"),
            Workload("mixtral-8x7b/decode-64", sizes(64, 4096, 14336, 8, 2), "mistralai/Mixtral-8x7B-v0.1 config.json"),
            Workload("two-cores/prefill-2048", sizes(2048, 1024, 512, 32, 4), "a size for a CPU"),
            *(
                Workload(f"{model}/small-{use}", sizes(num_tokens, *shape), f"a size for a CPU: {source}")
                for model, shape, source in SMALL_MODELS
                for use, num_tokens in (("decode-1", 1), ("decode-8", 8), ("decode-64", 64), ("prefill-1024", 1024))
            ),
        ),
        relabel=shuffled,
        cases=0.5,
        sharded={"num_tokens": "uneven", "num_experts": "even"},
        rejections=REJECTIONS,
        implementations=(
            triton(),
            compiled("torch-grouped"),
            jax("jax-grouped", dtypes=COMPILED_DTYPES),
            distributed("expert-parallel", dtypes=("float32", "bfloat16"), devices=DEVICES, world_sizes=(1, 2, 4)),
            # each number of devices takes a compilation: tests/test_jax_sharding.py has 1 and 2
            distributed("jax-expert-parallel", "expert_parallel:fused_swiglu", framework="jax", world_sizes=(4,)),
        ),
    )


SMALL_MODELS = (  # as many experts and choices, narrower by the same factor inside and outside
    ("mixtral-8x7b", (512, 1792, 8, 2), "mistralai/Mixtral-8x7B-v0.1 config.json, widths 1/8"),
    ("qwen3-30b-a3b", (512, 192, 128, 8), "Qwen/Qwen3-30B-A3B config.json, widths 1/4"),
    ("deepseek-v3", (448, 128, 256, 8), "deepseek-ai/DeepSeek-V3 config.json, widths 1/16"),
    ("olmoe-1b-7b", (512, 256, 64, 8), "allenai/OLMoE-1B-7B-0924 config.json, widths 1/4"),
)
COMPILED_DTYPES = ("float32", "bfloat16")  # each shape and dtype takes JAX a compilation
TILES = (16, 32, 64, 128)  # block sizes that grouped kernels use: regimes put group sizes just below, at and above one


def flops(parameters: Parameters) -> float:
    """Three matrix products a routed row."""
    routed = parameters["num_tokens"] * parameters["top_k"]
    return 6.0 * routed * parameters["hidden_size"] * parameters["intermediate_size"]


def moved(parameters: Parameters, itemsize: int) -> float:
    """Tokens read and written once, the weights of the experts in use read once, and what each row's expert and weight are."""
    tokens, width = parameters["num_tokens"], parameters["hidden_size"]
    routed = tokens * parameters["top_k"]
    used = min(parameters["num_experts"], routed)
    return itemsize * (3 * used * width * parameters["intermediate_size"] + 2 * tokens * width) + 12.0 * routed


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


def _some(tensor: torch.Tensor, rows: slice, columns: slice, value: torch.Tensor | float) -> torch.Tensor:
    changed = tensor.clone()
    changed[rows, columns] = value
    return changed


def _in_turn(tensors: Tensors) -> Tensors:
    """Each expert is the first choice of some token."""
    ids, experts = tensors["topk_ids"], len(tensors["w13"])
    return {"topk_ids": (torch.arange(len(ids))[:, None] + torch.arange(ids.shape[1])) % experts}


TRAITS = (
    Trait("int32", "dtype of topk_ids", dtypes={"topk_ids": "int32"}),
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


def _weights(draw: Draw, parameters: Parameters) -> Tensors:
    """Random weights scaled by fan-in, so that activations have unit variance."""
    experts, width, inner = (parameters[name] for name in ("num_experts", "hidden_size", "intermediate_size"))
    return {
        "w13": draw.normal(experts, 2 * inner, width) * width**-0.5,
        "w2": draw.normal(experts, width, inner) * inner**-0.5,
    }


def _routing(draw: Draw, parameters: Parameters) -> Tensors:
    """Distinct experts for each token, positive weights that sum to about 1."""
    tokens, top_k = parameters["num_tokens"], parameters["top_k"]
    return {
        "topk_weights": (0.2 + draw.uniform(tokens, top_k)) / top_k,
        "topk_ids": draw.distinct_rows(tokens, top_k, parameters["num_experts"]),
    }


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random tokens and weights of unit variance."""
    tokens = draw.normal(parameters["num_tokens"], parameters["hidden_size"])
    return {"hidden_states": tokens, **_weights(draw, parameters), **_routing(draw, parameters)}


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Integers, of which every partial sum is exact in any order, and which tell a low-precision accumulator.

    Each gate is 41, where the sigmoid rounds to 1; up values are sums of at most six ones; w2 is sparse and 0 or 1, or of
    both signs.
    """
    tokens, width, inner, experts = (
        parameters[name] for name in ("num_tokens", "hidden_size", "intermediate_size", "num_experts")
    )
    hidden = draw.integers(0, 2, tokens, width).to(torch.float64)
    hidden[:, 0] = 1
    w13 = torch.zeros(experts, 2 * inner, width, dtype=torch.float64)
    w13[:, :inner, 0] = 41
    w13[:, inner:] = _sparse(draw, experts * inner, width, 6).view(experts, inner, width)
    w2 = _sparse(draw, experts * width, inner, 16).view(experts, width, inner)
    signs = 1 - 2 * draw.integers(0, 2, *w2.shape) if draw.uniform(1).item() < 0.5 else torch.ones_like(w2)
    powers = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)[draw.integers(0, 3, tokens, parameters["top_k"])]
    return {"hidden_states": hidden, "w13": w13, "w2": w2 * signs, **_routing(draw, parameters), "topk_weights": powers}


def _sparse(draw: Draw, rows: int, columns: int, ones: int) -> torch.Tensor:
    """`[rows, columns]` of zeros with at most `ones` ones in each row."""
    positions = draw.integers(0, columns, rows, min(ones, columns))
    return torch.zeros(rows, columns, dtype=torch.float64).scatter(1, positions, 1.0)


def skewed(draw: Draw, parameters: Parameters) -> Tensors:
    """All tokens on one expert, or experts without tokens, or one expert with a tile's rows, one less, one more."""
    tensors = dithered(draw, parameters)
    tokens, experts = parameters["num_tokens"], parameters["num_experts"]
    favourite, kind = int(draw.integers(0, experts, 1)), int(draw.integers(0, 3, 1))
    first = torch.full((tokens,), favourite) if kind == 0 else torch.full((tokens,), (favourite + 1) % experts)
    if kind == 1:
        edges = [tile + step for tile in TILES for step in (-1, 0, 1) if tile + step <= tokens] or [tokens]
        first[: edges[int(draw.integers(0, len(edges), 1))]] = favourite
    order = torch.stack([torch.cat([each[None], (each + 1 + torch.arange(experts - 1)) % experts]) for each in first])
    return tensors | {"topk_ids": order[:, : parameters["top_k"]]}


def repeated(draw: Draw, parameters: Parameters) -> Tensors:
    """Experts chosen twice in a row; every third token chooses one alone, as often as it may: expert 0, or the last."""
    tokens, experts, top_k = (parameters[name] for name in ("num_tokens", "num_experts", "top_k"))
    ids = draw.integers(0, experts, tokens, top_k)
    ids[:, 1:2] = ids[:, :1]
    ids[::3] = (experts - 1) * draw.integers(0, 2, 1)
    return dithered(draw, parameters) | {"topk_ids": ids}


def cancelling(draw: Draw, parameters: Parameters) -> Tensors:
    """Sums of large terms of both signs; magnitudes from 2^-4 to 2^4 over the rows."""
    tensors = dithered(draw, parameters)
    scale = torch.exp2(draw.integers(-4, 5, parameters["num_tokens"], 1).to(torch.float64))
    alternating = 1 - 2 * (torch.arange(parameters["intermediate_size"]) % 2)
    return tensors | {"hidden_states": tensors["hidden_states"] * scale, "w2": tensors["w2"].abs() * alternating}


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """A token of NaN and one with an infinity; where most tokens are of other experts, the last one's weights are NaN."""
    tensors = dithered(draw, parameters)
    tensors["hidden_states"][parameters["num_tokens"] // 2] = torch.nan
    tensors["hidden_states"][-1, 0] = torch.inf
    if parameters["num_experts"] > 2 * parameters["top_k"]:
        tensors["w13"][-1] = torch.nan
        tensors["w2"][-1] = torch.nan
    return tensors


def tiny(draw: Draw, parameters: Parameters) -> Tensors:
    """Results among the subnormal numbers of float16, not below them all."""
    tensors = dithered(draw, parameters)
    return tensors | {"hidden_states": tensors["hidden_states"] * 2.0**-6, "w2": tensors["w2"] * 2.0**-5}


REJECTIONS = (
    Rejection(
        "ids for more tokens",
        "topk_ids",
        lambda call: {name: torch.cat([call[name], call[name][:1]]) for name in ("topk_ids", "topk_weights")},
    ),
    Rejection("w13 with an odd number of rows", "w13", changed("w13", lambda each: each[:, :-1])),
)


def shuffled(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Any order of the experts."""
    return draw.permutation(parameters["num_experts"])
