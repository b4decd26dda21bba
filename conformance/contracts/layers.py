"""Contracts of the layers that the diffusion models share."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_width, kinds
from gaugeblock.conformance.engine.implementation import compiled, triton
from gaugeblock.conformance.engine.inputs.bad_calls import changed, of_another_dtype
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import layers


@row
def layer_norm_modulate() -> Contract:
    """The row of `layers.layer_norm_modulate`."""
    return Contract(
        name="layers.layer_norm_modulate",
        summary="Each token is normalized to mean 0 and variance 1, then scaled and shifted as its example asks.",
        formula="out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * (1 + scale) + shift",
        source="Peebles and Xie 2022 (arXiv:2212.09748), section 3.2, adaLN; facebookresearch/DiT models.py, modulate",
        reference=layers.layer_norm_modulate,
        inputs=(
            Input("hidden_states", TOKENS_SHAPE, differentiable=True),
            Input("shift", STEERING_SHAPE, differentiable=True),
            Input("scale", STEERING_SHAPE, differentiable=True),
        ),
        outputs=(Output("modulated", TOKENS_SHAPE, differentiable=True),),
        options=("eps",),
        batch="batch_size",
        parameters=parameters,
        landmarks=LANDMARKS,
        factors=FACTORS,
        build=sizes,
        traits=TRAITS,
        regimes=_regimes(_norm),
        flops=lambda parameters: 9.0 * elements(parameters),
        workloads=WORKLOADS,
        cases=0.5,
        rejections=_rejections("hidden_states"),
        implementations=OURS,
    )


@row
def gated_residual_layer_norm_modulate() -> Contract:
    """The row of `layers.gated_residual_layer_norm_modulate`."""
    return Contract(
        name="layers.gated_residual_layer_norm_modulate",
        summary="A branch's result is added to the residual as far as the gate is open; the sum, not yet rounded, is normalized "
        "and modulated.",
        formula="hidden_states = residual + gate * branch; modulated = layer_norm_modulate(hidden_states, shift, scale)",
        source="Peebles and Xie 2022 (arXiv:2212.09748), figure 3, DiT block with adaLN-Zero",
        reference=layers.gated_residual_layer_norm_modulate,
        inputs=(
            Input("residual", TOKENS_SHAPE, differentiable=True),
            Input("branch", TOKENS_SHAPE, differentiable=True),
            Input("gate", STEERING_SHAPE, differentiable=True),
            Input("shift", STEERING_SHAPE, differentiable=True),
            Input("scale", STEERING_SHAPE, differentiable=True),
        ),
        outputs=(
            Output("hidden_states", TOKENS_SHAPE, differentiable=True),
            Output("modulated", TOKENS_SHAPE, differentiable=True),
        ),
        options=("eps",),
        batch="batch_size",
        parameters=parameters,
        landmarks=LANDMARKS,
        factors=FACTORS,
        build=sizes,
        traits=GATED_TRAITS,
        regimes=_regimes(_residual_norm),
        flops=lambda parameters: 11.0 * elements(parameters),
        workloads=WORKLOADS,
        cases=0.5,
        rejections=(*_rejections("residual"),),
        implementations=OURS,
    )


def elements(parameters: Parameters) -> int:
    """Of the tokens."""
    return int(parameters["batch_size"] * parameters["num_tokens"] * parameters["hidden_size"])


def sizes(batch_size: int, num_tokens: int, hidden_size: int, eps: float = 1e-6) -> dict[str, Any]:
    """One point of the input space."""
    return {"batch_size": batch_size, "num_tokens": num_tokens, "hidden_size": hidden_size, "eps": eps}


@st.composite
def parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes around block sizes, with tails."""
    return sizes(
        batch_size=draw(st.sampled_from([1, 2, 3, 5])),
        num_tokens=draw(st.sampled_from([1, 2, 4, 9, 16, 17, 33])),
        hidden_size=draw(st.sampled_from([2, 4, 16, 31, 64, 65, 100])),
        eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
    )


FACTORS = (
    edges("batch_size", 1, 2, 3),
    edges("num_tokens", 1, 2, 15, 16, 17, 33),
    kinds("hidden_size", kind_of_width, 2, 16, 31, 100),
    either("eps", 1e-6, 1e-5, 1e-3),
)


def _all(value: float, *names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: torch.full_like(tensors[name], value) for name in names}


TRAITS = (
    Trait("0, as at the start of a training", "steering", _all(0.0, "shift", "scale")),
    Trait("a scale of -1", "steering", _all(-1.0, "scale")),
)
GATED_TRAITS = (
    *TRAITS,
    Trait("0", "gate", _all(0.0, "gate")),
    Trait("1", "gate", _all(1.0, "gate")),
)


def _steering(draw: Draw, parameters: Parameters, *names: str) -> Tensors:
    return {name: draw.normal(parameters["batch_size"], parameters["hidden_size"]) for name in names}


def _tokens(draw: Draw, parameters: Parameters) -> torch.Tensor:
    return draw.normal(parameters["batch_size"], parameters["num_tokens"], parameters["hidden_size"])


def _near_constant(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Tokens whose variance is from a hundredth to a hundred times eps."""
    decades = 2 * draw.uniform(parameters["batch_size"], parameters["num_tokens"], 1) - 1
    return _tokens(draw, parameters) * parameters["eps"] ** 0.5 * 10**decades


def _far_from_zero(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """Tokens whose mean is up to a thousand times their deviation, which is from 2^-4 to 2^4."""
    shape = (parameters["batch_size"], parameters["num_tokens"], 1)
    means = (1 - 2 * draw.integers(0, 2, *shape)) * 10 ** (3 * draw.uniform(*shape))
    return (_tokens(draw, parameters) + means) * torch.exp2(draw.integers(-4, 5, *shape).to(torch.float64))


def _with_a_bad_token(draw: Draw, parameters: Parameters) -> torch.Tensor:
    """A token with a NaN in one example, one with an infinity in the last."""
    tokens = _tokens(draw, parameters)
    tokens[parameters["batch_size"] // 2, 0, -1] = torch.nan
    tokens[-1, -1, 0] = torch.inf
    return tokens


Tokens = Callable[[Draw, Parameters], torch.Tensor]


def _norm(tokens: Tokens) -> Callable[[Draw, Parameters], Tensors]:
    return lambda draw, parameters: {
        "hidden_states": tokens(draw, parameters),
        **_steering(draw, parameters, "shift", "scale"),
    }


def _residual_norm(tokens: Tokens) -> Callable[[Draw, Parameters], Tensors]:
    """Residuals and branches of a kind."""
    return lambda draw, parameters: {
        "residual": tokens(draw, parameters),
        "branch": tokens(draw, parameters),
        **_steering(draw, parameters, "gate", "shift", "scale"),
    }


def _regimes(make: Callable[[Tokens], Callable[[Draw, Parameters], Tensors]]) -> tuple[Regime, ...]:
    return (
        Regime("dithered", make(_tokens)),
        Regime("constants", make(_near_constant)),
        # without gradients: those of torch's own float32 layer_norm lie up to 1.7 times this budget from the oracle
        Regime("adversarial", make(_far_from_zero), "worst element", differentiable=False),
        Regime("special", make(_with_a_bad_token), "worst element", differentiable=False),
    )


def _rejections(tokens: str) -> tuple[Rejection, ...]:
    return (
        Rejection("shift for another batch", "shift", changed("shift", lambda each: torch.cat([each, each]))),
        Rejection("shift of another width", "shift", changed("shift", lambda each: each[:, :-1])),
        Rejection("scale of another dtype", "scale", changed("scale", of_another_dtype)),
        Rejection("eps of 0", "eps", lambda call: {"eps": 0.0}),
    )


LANDMARKS = (
    sizes(2, 17, 100),  # tails everywhere
    sizes(3, 4, 320, 1e-5),  # long sums
    sizes(1, 4, 1152),  # DiT-XL/2
    sizes(1, 1025, 4),  # gradients of the steering are sums over many tiles of tokens
)
WORKLOADS = (
    Workload("dit-xl-2/256px-batch-32", sizes(32, 256, 1152), "facebookresearch/DiT models.py, DiT_XL_2"),
    Workload("dit-xl-2/512px-batch-8", sizes(8, 1024, 1152), "facebookresearch/DiT models.py, DiT_XL_2"),
    Workload("dit-s-2/256px-batch-256", sizes(256, 256, 384), "facebookresearch/DiT models.py, DiT_S_2; the paper's batch"),
    Workload("two-cores/256px-batch-4", sizes(4, 256, 384), "a size for a CPU, DiT_S_2"),
)
TOKENS_SHAPE, STEERING_SHAPE = ("batch_size", "num_tokens", "hidden_size"), ("batch_size", "hidden_size")


# on a CPU every kind of call takes seconds to compile: tests/test_compiled.py has a few
OURS = (triton(), compiled("compiled", devices=("cuda",)))
