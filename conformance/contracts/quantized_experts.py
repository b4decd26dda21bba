"""Contracts of experts whose weights are held in eight bits."""

from dataclasses import replace
from typing import Any

import torch

from gaugeblock.conformance.contracts import routed_experts as of_experts
from gaugeblock.conformance.contracts.routed_experts import sizes
from gaugeblock.conformance.engine.contract import Contract, Derived, Input, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges
from gaugeblock.conformance.engine.implementation import triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import E4M3_MAX
from gaugeblock.reference.torch import quantized_experts


@row
def fused_swiglu_int8() -> Contract:
    """The row of `quantized_experts.fused_swiglu_int8`."""
    return Contract(
        name="quantized_experts.fused_swiglu_int8",
        summary="Each token passes the SwiGLU experts that its router chose, whose weights are int8 with a scale for each row.",
        formula=(
            "gate, up = halves of w13_scales[e] * (w13[e] @ hidden_states[t]); out[t] = sum over j of topk_weights[t, j] * "
            "w2_scales[e] * (w2[e] @ (silu(gate) * up)), e = topk_ids[t, j]"
        ),
        source="Dettmers et al. 2022 (arXiv:2208.07339) section 2.1, of weights alone; layout as in vLLM's fused_experts",
        reference=quantized_experts.fused_swiglu_int8,
        inputs=(
            of_experts.HIDDEN_STATES,
            replace(of_experts.W13, dtype="int8", differentiable=False),
            Input("w13_scales", ("num_experts", "two_intermediate_sizes"), dtype="float32"),
            replace(of_experts.W2, dtype="int8", differentiable=False),
            Input("w2_scales", ("num_experts", "hidden_size"), dtype="float32"),
            *of_experts.ROUTES,
        ),
        outputs=of_experts.OUTPUTS,
        options=(),
        batch="num_tokens",
        parameters=of_experts.parameters,
        landmarks=(
            of_experts.LANDMARKS[0],
            sizes(16, 128, 96, 16, 2),  # aligned, tokens and experts too: kernels read neighbours together
            *of_experts.LANDMARKS[1:4],
            sizes(9, 24, 24, 4, 2),  # hidden and intermediate size equal: scales of rows fit along columns
            sizes(3, 16, 8, 128, 8),  # Qwen3's
            of_experts.IDS_ABOVE_255,
        ),
        factors=of_experts.FACTORS,
        build=of_experts.point,
        traits=(*of_experts.TRAITS, *INT8_TRAITS),
        regimes=(
            *(replace(each, make=quantized(each.make)) for each in of_experts.regimes(of_experts.dithered, down=-5)),
            Regime("lattice", lattice, "exact", differentiable=False),
        ),
        flops=of_experts.flops,
        moved=moved,
        workloads=(
            Workload("mixtral-8x7b/decode-64", sizes(64, 4096, 14336, 8, 2), "mistralai/Mixtral-8x7B-v0.1 config.json"),
            Workload("qwen3-30b-a3b/prefill-4096", sizes(4096, 2048, 768, 128, 8), "Qwen/Qwen3-30B-A3B config.json"),
            Workload("two-cores/prefill-2048", sizes(2048, 1024, 512, 32, 4), "a size for a CPU"),
        ),
        relabel=of_experts.shuffled,
        cases=0.5,
        rejections=(
            of_experts.IDS_FOR_MORE_TOKENS,
            of_experts.ODD_ROWS,
            Rejection("weights that are not signed", "w13", changed("w13", lambda each: each.to(torch.uint8))),
        ),
        implementations=(triton(),),
    )


@row
def fused_swiglu_fp8() -> Contract:
    """The row of `quantized_experts.fused_swiglu_fp8`."""
    return Contract(
        name="quantized_experts.fused_swiglu_fp8",
        summary="Each token passes the SwiGLU experts that its router chose, all of whose operands are e4m3 with scales.",
        formula=(
            "gate, up = halves of w13'[e] @ q(hidden_states[t]); out[t] = sum over j of topk_weights[t, j] * w2'[e] @ "
            "q(silu(gate) * up), e = topk_ids[t, j]; w'[r, c] = w[r, c] * scales[r // block_size, c // block_size]; q: "
            "quantization.quantize_token_groups and back"
        ),
        source="DeepSeek-V3 Technical Report (arXiv:2412.19437) section 3.3.2 and figure 7",
        reference=quantized_experts.fused_swiglu_fp8,
        inputs=(
            replace(of_experts.HIDDEN_STATES, differentiable=False),
            replace(of_experts.W13, dtype="float8_e4m3fn", differentiable=False),
            Input("w13_scales", ("num_experts", _blocks("two_intermediate_sizes"), _blocks("hidden_size")), dtype="float32"),
            replace(of_experts.W2, dtype="float8_e4m3fn", differentiable=False),
            Input("w2_scales", ("num_experts", _blocks("hidden_size"), _blocks("intermediate_size")), dtype="float32"),
            *(replace(each, differentiable=False) for each in of_experts.ROUTES),
        ),
        outputs=tuple(replace(each, differentiable=False) for each in of_experts.OUTPUTS),
        options=("block_size",),
        batch="num_tokens",
        landmarks=(
            fp8_sizes(33, 100, 70, 5, 2, 32),  # tails everywhere, and a block of gates and ups
            fp8_sizes(9, 256, 128, 2, 1, 128),  # DeepSeek-V3's blocks, all whole
            fp8_sizes(17, 64, 48, 8, 2, 16),
            fp8_sizes(9, 192, 104, 3, 2, 48),  # no power of two
            fp8_sizes(5, 40, 24, 32, 4, 128),  # one block
            fp8_sizes(9, 300, 150, 2, 1, 128),  # blocks with tails
            fp8_sizes(150, 20, 24, 3, 2, 16),  # several tiles of rows for an expert
            fp8_sizes(3, 8, 8, 257, 3, 4),  # ids above 255
        ),
        factors=(*of_experts.FACTORS, edges("block_size", 1, 2, 16, 17, 32, 48, 64, 128, option=True)),
        build=fp8_point,
        traits=(*of_experts.TRAITS, NARROW_SCALES),
        regimes=(
            *(replace(each, make=in_blocks(each.make)) for each in of_experts.regimes(of_experts.dithered, down=-5)),
            Regime("lattice", fp8_lattice, "exact"),
        ),
        flops=of_experts.flops,
        moved=fp8_moved,
        workloads=(
            Workload("deepseek-v3/prefill-4096", fp8_sizes(4096, 7168, 2048, 256, 8, 128), "deepseek-ai/DeepSeek-V3 config.json"),
            Workload("deepseek-v3/decode-64", fp8_sizes(64, 7168, 2048, 256, 8, 128), "deepseek-ai/DeepSeek-V3 config.json"),
            Workload("two-cores/prefill-2048", fp8_sizes(2048, 1024, 512, 32, 4, 128), "a size for a CPU"),
        ),
        relabel=of_experts.shuffled,
        cases=0.5,
        rejections=(
            of_experts.IDS_FOR_MORE_TOKENS,
            of_experts.ODD_ROWS,
            Rejection("blocks of no row", "block_size", lambda call: {"block_size": 0}),
            Rejection("a row of blocks too few", "w13_scales", changed("w13_scales", lambda each: each[:, 1:])),
            Rejection("a column of blocks too many", "w2_scales", changed("w2_scales", lambda each: each.repeat(1, 1, 2))),
        ),
        implementations=(triton("fp8_experts:fused_swiglu_fp8"),),
    )


def moved(parameters: Parameters, itemsize: int) -> float:
    """Tokens read and written once, the weights and scales of the experts in use read once, and what each row's route is."""
    tokens, width, inner = (parameters[name] for name in ("num_tokens", "hidden_size", "intermediate_size"))
    routed = tokens * parameters["top_k"]
    used = min(parameters["num_experts"], routed)
    return used * (3 * width * inner + 4 * (2 * inner + width)) + itemsize * 2 * tokens * width + 12.0 * routed


def fp8_moved(parameters: Parameters, itemsize: int) -> float:
    """The same, but that there is a scale for each block of weights."""
    tokens, width, inner = (parameters[name] for name in ("num_tokens", "hidden_size", "intermediate_size"))
    routed = tokens * parameters["top_k"]
    used = min(parameters["num_experts"], routed)
    scales = 3 * width * inner / parameters["block_size"] ** 2
    return used * (3 * width * inner + 4 * scales) + itemsize * 2 * tokens * width + 12.0 * routed


def _blocks(dimension: str) -> Derived:
    """How many a dimension is cut into."""
    return Derived(f"blocks of {dimension}", lambda parameters: -(-parameters[dimension] // parameters["block_size"]))


def fp8_sizes(*of_routed: int) -> dict[str, Any]:
    """One point of the input space of `fused_swiglu_fp8`, `block_size` last."""
    return sizes(*of_routed[:-1]) | {"block_size": of_routed[-1]}


def fp8_point(block_size: int, **values: int) -> dict[str, Any] | None:
    """The point with these values of the factors."""
    point = of_experts.point(**values)
    return point and point | {"block_size": block_size}


def quantized(make: of_experts.Make) -> of_experts.Make:
    """Weights as a regime of experts draws them, quantized: the largest of each row is 127 times its scale.

    Rows have scales that lie up to a factor of 4 apart, so that one in the place of another shows.
    """

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors = make(draw, parameters)
        for name in ("w13", "w2"):
            weights = tensors[name] * torch.exp2(2 * draw.uniform(*tensors[name].shape[:2], 1) - 1)
            scales = weights.abs().amax(2) / 127
            tensors |= {name: (weights / scales[..., None]).round().nan_to_num(0.0).long(), f"{name}_scales": scales}
        return tensors

    return made


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """The lattice of experts, of which every partial sum is exact; scales are powers of two, those of gates 1."""
    tensors = of_experts.lattice(draw, parameters)
    scales = {name: torch.exp2(draw.integers(-1, 2, *tensors[name].shape[:2]).double()) for name in ("w13", "w2")}
    scales["w13"][:, : parameters["intermediate_size"]] = 1
    return tensors | {name: tensors[name].long() for name in scales} | {f"{name}_scales": scales[name] for name in scales}


def in_blocks(make: of_experts.Make) -> of_experts.Make:
    """Weights as a regime of experts draws them, quantized: the largest of each block is 448 times its scale.

    Blocks have scales that lie up to a factor of 4 apart, so that one in the place of another shows.
    """

    def made(draw: Draw, parameters: Parameters) -> Tensors:
        tensors, block = make(draw, parameters), parameters["block_size"]
        for name in ("w13", "w2"):
            experts, rows, columns = tensors[name].shape
            drawn = torch.exp2(2 * draw.uniform(experts, -(-rows // block), -(-columns // block)) - 1)
            weights = tensors[name] * _of_blocks(drawn, block, rows, columns)
            padded = torch.nn.functional.pad(weights, (0, -columns % block, 0, -rows % block))
            scales = padded.abs().unfold(1, block, block).unfold(2, block, block).amax((3, 4)) / E4M3_MAX
            tensors |= {name: weights / _of_blocks(scales, block, rows, columns), f"{name}_scales": scales}
        return tensors

    return made


def _of_blocks(scales: torch.Tensor, block: int, rows: int, columns: int) -> torch.Tensor:
    """The scale of each element."""
    return scales.repeat_interleave(block, 1)[:, :rows].repeat_interleave(block, 2)[:, :, :columns]


def fp8_lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Numbers that are rounded to e4m3 far from ties, to the same ones in any code, and of which every partial sum is exact; the
    largest of each group is a 448, and all scales are powers of two.

    Each gate is above 41, where the sigmoid rounds to 1, and each up is one element of the token: of the first of a group of
    activations it is 32, the largest that there is. Of a group that has but one column no sum would be exact: it is 0.
    """
    tokens, width, inner, experts, block = (
        parameters[name] for name in ("num_tokens", "hidden_size", "intermediate_size", "num_experts", "block_size")
    )
    w13 = torch.zeros(experts, 2 * inner, width, dtype=torch.float64)
    w13[:, :inner, 0] = torch.tensor([16.0, 15.0, 13.0], dtype=torch.float64)[draw.integers(0, 3, experts, inner)] / 64
    w13[:, :inner:block, 0] = 0.25
    between = torch.tensor([column for column in range(width) if column % block])
    if len(between):
        columns = between[draw.integers(0, len(between), experts, inner)]
        columns[:, ::block] = 1
        w13[:, inner:] = torch.nn.functional.one_hot(columns, width)
    w2 = of_experts.sparse(draw, experts * width, inner, 6).view(experts, width, inner)
    w2 *= 1 - 2 * draw.integers(0, 2, *w2.shape)
    scales = torch.exp2(draw.integers(0, 2, experts, 1, 1).double()).repeat(1, *_counts(w13, block))
    scales[:, : inner // block] *= torch.exp2(draw.integers(0, 2, experts, inner // block, 1).double())
    return {
        "hidden_states": _lattice_tokens(draw, tokens, width, block),
        "w13": w13,
        "w13_scales": scales,
        "w2": w2,
        "w2_scales": torch.exp2(draw.integers(-7, -5, experts, *_counts(w2, block)).double()),
        **of_experts.lattice_routing(draw, parameters),
    }


def _lattice_tokens(draw: Draw, tokens: int, width: int, block: int) -> torch.Tensor:
    """Tokens of 0, 1, 13, and 33, which becomes 32; groups begin with 448, and some are 2^-10 as large, where a scale that is
    another group's makes a subnormal number of 13."""
    hidden = torch.tensor([0.0, 1.0, 13.0, 33.0], dtype=torch.float64)[draw.integers(0, 4, tokens, width)]
    small = (draw.uniform(tokens, -(-width // block)) < 0.5).repeat_interleave(block, 1)[:, :width]
    small[:, :block] = False
    hidden = torch.where(small, 13 * (hidden > 1), hidden)
    hidden[:, ::block] = E4M3_MAX
    hidden[:, 1:2] = torch.where(torch.arange(1, width)[:1] % block != 0, 32.0, hidden[:, 1:2])
    return hidden * torch.where(small, 2.0**-10, 1.0)


def _counts(weights: torch.Tensor, block: int) -> tuple[int, int]:
    """How many blocks there are of rows, and of columns."""
    return -(-weights.shape[1] // block), -(-weights.shape[2] // block)


def _with_least(weights: torch.Tensor) -> torch.Tensor:
    """With -128, which has no opposite, in the first column."""
    return torch.cat([torch.full_like(weights[..., :1], -128), weights[..., 1:]], -1)


NARROW_SCALES = Trait("bfloat16", "dtype of scales", dtypes={"w13_scales": "bfloat16", "w2_scales": "bfloat16"})
INT8_TRAITS = (
    NARROW_SCALES,
    Trait("-128 in w13", "w13", lambda tensors: {"w13": _with_least(tensors["w13"])}),
    Trait("-128 in w2", "w2", lambda tensors: {"w2": _with_least(tensors["w2"])}),
    Trait("every other one 0", "w13_scales", lambda tensors: {"w13_scales": _every_other(tensors["w13_scales"])}),
    Trait("negative w2_scales", "w2_scales", lambda tensors: {"w2_scales": -tensors["w2_scales"].abs()}),
)


def _every_other(scales: torch.Tensor) -> torch.Tensor:
    return scales * (torch.arange(scales.shape[1]) % 2)
