"""Contracts of gated activations."""

import math
from collections.abc import Callable
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import compiled, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed, of_another_dtype
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import gated_activations


@row
def swiglu() -> Contract:
    """The row of `gated_activations.swiglu`."""
    return _contract(
        name="gated_activations.swiglu",
        summary="up times the SiLU of gate.",
        formula="out = silu(gate) * up,  silu(x) = x * sigmoid(x)",
        source="Shazeer 2020 (arXiv:2002.05202), equation 5, SwiGLU without biases",
        lowest=-8,
        reference=gated_activations.swiglu,
        options=(),
        landmarks=tuple(sizes(*each) for each in LANDMARKS),
        factors=FACTORS,
        build=sizes,
        workloads=(
            Workload("qwen3-8b/prefill-4096", sizes(1, 4096, 12288), "Qwen/Qwen3-8B config.json"),
            Workload("qwen3-8b/decode-64", sizes(64, 1, 12288), "Qwen/Qwen3-8B config.json"),
            Workload("two-cores/64-tokens", sizes(1, 64, 12288), "a size for a CPU, Qwen3-8B"),
        ),
    )


@row
def geglu() -> Contract:
    """The row of `gated_activations.geglu`."""
    return _contract(
        name="gated_activations.geglu",
        summary="up times the GELU of gate, exact or by tanh.",
        formula="out = gelu(gate) * up,  gelu(x) = x / 2 * (1 + erf(x / sqrt(2))), "
        "or x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))",
        source="Shazeer 2020 (arXiv:2002.05202), equation 5, GEGLU without biases; Hendrycks and Gimpel (arXiv:1606.08415), "
        "section 2",
        # nearer to 0, torch's own exact GELU in float32 lies up to 1.3 times the budget off: its erf has errors of 2e-7
        lowest=2,
        reference=gated_activations.geglu,
        options=("approximation",),
        landmarks=tuple(
            approximated(*each, approximation)
            for each, approximation in zip(LANDMARKS, ("none", "none", "tanh", "tanh"), strict=True)
        ),
        factors=(*FACTORS, either("approximation", "none", "tanh")),
        build=approximated,
        workloads=(
            Workload("sdxl/1024px-batch-2", approximated(2, 4096, 2560), f"{SDXL}: the blocks of 640 channels"),
            Workload("sdxl/1024px-batch-2-middle", approximated(2, 1024, 5120), f"{SDXL}: the blocks of 1280 channels"),
            Workload("gemma-2-2b/prefill-4096", approximated(1, 4096, 9216, "tanh"), "google/gemma-2-2b config.json"),
            Workload("gemma-2-2b/decode-64", approximated(64, 1, 9216, "tanh"), "google/gemma-2-2b config.json"),
            Workload("two-cores/256-tokens", approximated(1, 256, 5120), f"a size for a CPU; {SDXL}"),
        ),
    )


def _contract(lowest: int, **fields: Any) -> Contract:
    """What both have in common; the power of two from which on adversarial gates are drawn."""
    return Contract(
        inputs=(Input("gate", SHAPE, differentiable=True), Input("up", SHAPE, differentiable=True)),
        outputs=(Output("out", SHAPE, differentiable=True),),
        batch="batch_size",
        traits=TRAITS,
        regimes=(
            Regime("dithered", _dithered),
            Regime("adversarial", _saturated(lowest), "worst element"),
            Regime("special", _with_bad_values, "worst element", differentiable=False),
        ),
        flops=lambda parameters: 8.0 * math.prod(parameters[each] for each in SHAPE),
        cases=0.3,
        rejections=(
            Rejection("up of another dtype", "up", changed("up", of_another_dtype)),
            Rejection("gate of another width", ("gate", "up"), changed("gate", lambda each: torch.cat([each, each], -1))),
        ),
        # on a CPU every kind of call takes seconds to compile: tests/test_compiled.py has a few
        implementations=(triton(), compiled("compiled", devices=("cuda",))),
        **fields,
    )


def sizes(batch_size: int, num_tokens: int, intermediate_size: int) -> dict[str, Any]:
    """One point of the input space."""
    return {"batch_size": batch_size, "num_tokens": num_tokens, "intermediate_size": intermediate_size}


def approximated(batch_size: int, num_tokens: int, intermediate_size: int, approximation: str = "none") -> dict[str, Any]:
    """One point of the input space of a GELU."""
    return {**sizes(batch_size, num_tokens, intermediate_size), "approximation": approximation}


FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_tokens", 1, 2, 4, 5, 17),
    kinds("intermediate_size", kind_of_width, 1, 16, 31, 34, 300),
)


def _all(value: float, name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: torch.full_like(tensors[name], value)}


TRAITS = (
    Trait("0", "gate", _all(0.0, "gate")),
    Trait("1", "up", _all(1.0, "up")),
)


def _normal(draw: Draw, parameters: Parameters) -> torch.Tensor:
    return draw.normal(*(parameters[each] for each in SHAPE))


def _dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Gates as far from 0 as where both GELUs differ most, and beyond."""
    return {"gate": 2 * _normal(draw, parameters), "up": _normal(draw, parameters)}


def _saturated(lowest: int) -> Callable[[Draw, Parameters], Tensors]:
    """Gates from 2^lowest to 2^7, of which all is left, and from -2^lowest to -2^4, of which almost nothing is; of less, float32
    has nothing. Ups of up to 2^6."""

    def make(draw: Draw, parameters: Parameters) -> Tensors:
        shape = tuple(parameters[each] for each in SHAPE)
        is_negative = draw.integers(0, 2, *shape).bool()
        powers = draw.integers(lowest, 7, *shape).to(torch.float64)
        magnitudes = (1 + draw.uniform(*shape)) * torch.exp2(torch.where(is_negative, powers.clamp(max=3), powers))
        ups = _normal(draw, parameters) * torch.exp2(draw.integers(-6, 7, *shape).to(torch.float64))
        return {"gate": torch.where(is_negative, -magnitudes, magnitudes), "up": ups}

    return make


def _with_bad_values(draw: Draw, parameters: Parameters) -> Tensors:
    """A gate of NaN in one example, an infinite up in the last. No infinite gate: that of -inf is 0 times infinity, and of inf
    torch's own exact GELU is NaN in its vectors and inf behind the last one (2.13)."""
    tensors = _dithered(draw, parameters)
    tensors["gate"][parameters["batch_size"] // 2, 0, -1] = torch.nan
    tensors["up"][-1, -1, 0] = torch.inf
    return tensors


SHAPE = ("batch_size", "num_tokens", "intermediate_size")
SDXL = "stabilityai/stable-diffusion-xl-base-1.0 unet/config.json"
LANDMARKS = (
    (2, 5, 70),  # tails everywhere
    (1, 4, 320),  # a block of columns and a part of one
    (2, 17, 3),
    (1, 1, 1024),
)
