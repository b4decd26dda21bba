"""Contracts of predictions."""

import math
from typing import Any

import torch

from gaugeblock.conformance.contracts.noised_examples import (
    FACTORS,
    SHAPE,
    all_equal,
    arrays,
    builder,
    by_value,
    elements,
    examples,
    options_of,
    with_bad_ones,
    without_axes,
    workloads,
)
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import edges, either
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import predictions


@row
def add_noise() -> Contract:
    """The row of `predictions.add_noise`."""
    return Contract(
        name="predictions.add_noise",
        summary="Mixes data and noise, as much of each as an example has.",
        formula="x[b] = alphas[b] data[b] + sigmas[b] noise[b]",
        source="Kingma et al. 2021 (arXiv:2107.00630) equation 1",
        reference=predictions.add_noise,
        inputs=arrays("data", "noise", "alphas", "sigmas"),
        outputs=(Output("noised", SHAPE, differentiable=True),),
        options=(),
        batch="batch_size",
        landmarks=(builder()(3, 4, 65), builder()(2, 3, 15)),
        factors=FACTORS,
        build=builder(),
        traits=ENDS,
        regimes=(
            Regime("dithered", mixtures),
            Regime("adversarial", near_ends, "worst element"),
            Regime("special", special, "worst element", differentiable=False),
        ),
        flops=lambda parameters: 3 * elements(parameters),
        workloads=workloads(builder()),
        cases=0.2,
        rejections=(*NEGATIVE, without_axes("data")),
    )


@row
def prediction_target() -> Contract:
    """The row of `predictions.prediction_target`."""
    sizes = builder(prediction_type="v_prediction")
    return Contract(
        name="predictions.prediction_target",
        summary="What a model of a kind is trained to predict.",
        formula="noise; data; alphas[b] noise[b] - sigmas[b] data[b]; or noise - data",
        source="Salimans and Ho 2022 (arXiv:2202.00512) section 4; Liu et al. 2022 (arXiv:2209.03003) equation 1",
        reference=predictions.prediction_target,
        inputs=arrays("data", "noise", "alphas", "sigmas"),
        outputs=(Output("target", SHAPE, differentiable=True),),
        options=("prediction_type",),
        batch="batch_size",
        landmarks=tuple(
            sizes(3, 4, 65, prediction_type=kind) for kind in ("v_prediction", "flow_prediction", "epsilon", "sample")
        ),
        factors=options_of(prediction_type=KINDS),
        build=sizes,
        traits=ENDS,
        regimes=(
            Regime("dithered", mixtures),
            Regime("adversarial", near_ends, "worst element"),
        ),
        flops=lambda parameters: 3 * elements(parameters),
        workloads=workloads(sizes),
        cases=0.2,
        rejections=(*NEGATIVE, without_axes("data")),
    )


@row
def convert_prediction() -> Contract:
    """The row of `predictions.convert_prediction`."""
    sizes = builder(prediction_type="epsilon", to="sample")
    return Contract(
        name="predictions.convert_prediction",
        summary="What a prediction of one kind says of another.",
        formula="x = alphas data + sigmas noise and p = n noise + d data, solved for data and noise: n' noise + d' data",
        source="Salimans and Ho 2022 (arXiv:2202.00512) appendix D",
        reference=predictions.convert_prediction,
        inputs=arrays("prediction", "noised", "alphas", "sigmas"),
        outputs=(Output("converted", SHAPE, differentiable=True),),
        options=("prediction_type", "to"),
        batch="batch_size",
        landmarks=(
            sizes(3, 4, 65),
            sizes(2, 3, 16, prediction_type="v_prediction", to="sample"),
            sizes(2, 3, 15, prediction_type="v_prediction", to="epsilon"),
            sizes(3, 2, 24, prediction_type="sample", to="epsilon"),
            sizes(3, 2, 16, prediction_type="flow_prediction", to="sample"),
        ),
        factors=options_of(prediction_type=KINDS, to=KINDS),
        build=conversions,
        traits=LITTLE,
        regimes=(
            Regime("dithered", noised_mixtures),
            Regime("adversarial", noised_near_ends, "worst element"),
        ),
        flops=lambda parameters: 3 * elements(parameters),
        workloads=workloads(sizes),
        cases=0.2,
        rejections=(
            *NEGATIVE,
            without_axes("prediction"),
            _unsolvable("nothing of the data", "epsilon", "alphas"),
            _unsolvable("nothing of the noise", "sample", "sigmas"),
        ),
    )


@row
def min_snr_weights() -> Contract:
    """The row of `predictions.min_snr_weights`."""
    return Contract(
        name="predictions.min_snr_weights",
        summary="Weights of squared errors for which data count with min(snr, gamma), whatever is predicted.",
        formula="m = min(snr, gamma): m, m / snr, m / (snr + 1) or m / (1 + sqrt(snr))**2; 1 for epsilon where snr is 0",
        source="Hang et al. 2023 (arXiv:2303.09556) section 3.4",
        reference=predictions.min_snr_weights,
        inputs=(Input("snr", ("batch_size",), dtype="float32"),),
        outputs=(Output("weights", ("batch_size",), dtype="float32"),),
        options=("prediction_type", "gamma"),
        batch="batch_size",
        dtypes=("float32",),
        landmarks=tuple(weight_sizes(33, kind) for kind in KINDS),
        factors=(edges("batch_size", 1, 2, 3, 32, 65), either("prediction_type", *KINDS), either("gamma", 5.0, 1.0)),
        build=weight_sizes,
        traits=(all_equal("values of snr", snr=0.0), all_equal("values of snr", snr=math.inf)),
        regimes=(
            Regime("dithered", ratios, differentiable=False),
            Regime("adversarial", ratios_at_the_limit, "worst element", differentiable=False),
        ),
        flops=lambda parameters: 3.0 * parameters["batch_size"],
        workloads=(Workload("dit-xl-2/batch-256", weight_sizes(256, "epsilon"), "Hang et al. (arXiv:2303.09556) section 4.1"),),
        cases=0.2,
        rejections=(by_value("a negative ratio", "snr", {"snr": -1.0}),),
        without={"gradients": "nothing has a gradient"},
    )


KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def _unsolvable(name: str, prediction_type: str, rate: str) -> Rejection:
    """A prediction of one of two things in an example that has nothing of the other."""
    return Rejection(
        name,
        rate,
        lambda call: {"prediction_type": prediction_type, "to": "v_prediction", rate: torch.zeros_like(call[rate])},
        by_values=True,
    )


def conversions(batch_size: int, channels: int, size: int, prediction_type: str, to: str) -> dict[str, Any] | None:
    """One point of the conversions' input space; one to its own kind is none, and depends on nothing else."""
    if prediction_type == to:
        return None
    return builder()(batch_size, channels, size, prediction_type=prediction_type, to=to)


def weight_sizes(batch_size: int, prediction_type: str, gamma: float = 5.0) -> dict[str, object]:
    """One point of the weights' input space."""
    return {"batch_size": batch_size, "prediction_type": prediction_type, "gamma": gamma}


def mixtures(draw: Draw, parameters: Parameters) -> Tensors:
    """Random examples, anything from data to noise."""
    angles = (0.02 + 0.96 * draw.uniform(parameters["batch_size"])) * math.pi / 2
    return examples(draw, parameters, "data", "noise") | {"alphas": torch.cos(angles), "sigmas": torch.sin(angles)}


def near_ends(draw: Draw, parameters: Parameters) -> Tensors:
    """Nearly data or nearly noise, and data that are nearly the noise."""
    tensors = examples(draw, parameters, "data", "noise")
    ends = torch.tensor([0.0, 1.0, 2.0**-12, 2.0**-24], dtype=torch.float64)
    small = ends[draw.integers(0, 4, parameters["batch_size"])]
    near = tensors["noise"] + 2.0**-6 * tensors["data"]
    return tensors | {"data": near, "alphas": small, "sigmas": (1 - small**2).sqrt()}


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """An image of NaN and one with an infinity."""
    return with_bad_ones(mixtures(draw, parameters), "data")


def _noised(tensors: Tensors) -> Tensors:
    return {"prediction" if name == "data" else "noised" if name == "noise" else name: each for name, each in tensors.items()}


def noised_mixtures(draw: Draw, parameters: Parameters) -> Tensors:
    """Random predictions and examples, neither rate being less than 0.03."""
    return _noised(mixtures(draw, parameters))


def noised_near_ends(draw: Draw, parameters: Parameters) -> Tensors:
    """Little of the data or of the noise left, by which a difference is divided."""
    tensors = noised_mixtures(draw, parameters)
    small = torch.exp2(-4 - 12 * draw.uniform(parameters["batch_size"]))
    is_data = draw.integers(0, 2, parameters["batch_size"]) == 1
    large = (1 - small**2).sqrt()
    rates = {"alphas": torch.where(is_data, small, large), "sigmas": torch.where(is_data, large, small)}
    return tensors | rates


def ratios(draw: Draw, parameters: Parameters) -> Tensors:
    """From a thousandth to a thousand."""
    return {"snr": 10 ** (6 * draw.uniform(parameters["batch_size"]) - 3)}


def ratios_at_the_limit(draw: Draw, parameters: Parameters) -> Tensors:
    """0, infinity, gamma and its neighbours."""
    gamma = parameters["gamma"]
    values = torch.tensor([0.0, math.inf, gamma, gamma * (1 + 2.0**-20), gamma * (1 - 2.0**-20), 1e-30], dtype=torch.float64)
    return {"snr": values[draw.integers(0, len(values), parameters["batch_size"])]}


ENDS = (all_equal("rates", alphas=1.0, sigmas=0.0), all_equal("rates", alphas=0.0, sigmas=1.0))
LITTLE = (
    all_equal("rates", alphas=2.0**-8, sigmas=0.8),  # a rate near 1 would round all products to one side
    all_equal("rates", alphas=0.6, sigmas=2.0**-8),
)
NEGATIVE = (
    by_value("less than nothing of the data", "alphas", {"alphas": -0.5}),
    by_value("less than nothing of the noise", "sigmas", {"sigmas": -0.5}),
    by_value("data without end", "alphas", {"alphas": math.inf}),
)
