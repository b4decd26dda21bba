"""Contracts of the objectives."""

from collections.abc import Callable
from typing import Any

import torch

from gaugeblock.conformance.contracts.noised_examples import by_value
from gaugeblock.conformance.engine.contract import Contract, Input, Output, Regime, Rejection, Workload, row
from gaugeblock.conformance.engine.factors import Trait, edges, either, kind_of_width, kinds
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.torch import objectives


@row
def rectified_flow_interpolate() -> Contract:
    """The row of `objectives.rectified_flow_interpolate`."""
    return Contract(
        name="objectives.rectified_flow_interpolate",
        summary="Goes the straight way from data to noise as far as the times say.",
        formula="x[b] = (1 - times[b]) data[b] + times[b] noise[b]",
        source=RECTIFIED_FLOW,
        reference=objectives.rectified_flow_interpolate,
        inputs=(DATA, NOISE, TIMES),
        outputs=(Output("noised", SHAPE, differentiable=True),),
        options=(),
        batch="batch_size",
        landmarks=LANDMARKS,
        factors=FACTORS,
        build=sizes,
        traits=TIME_TRAITS,
        regimes=_regimes("data", "noise", "times", exact=True),
        flops=flops,
        workloads=WORKLOADS,
        cases=0.5,
        rejections=(NO_BATCH,),
    )


@row
def rectified_flow_velocity() -> Contract:
    """The row of `objectives.rectified_flow_velocity`."""
    return Contract(
        name="objectives.rectified_flow_velocity",
        summary="The velocity on the straight way between data and noise, whose sign has a name.",
        formula="noise - data, or data - noise",
        source=RECTIFIED_FLOW,
        reference=objectives.rectified_flow_velocity,
        inputs=(DATA, NOISE),
        outputs=(Output("velocity", SHAPE, differentiable=True),),
        options=("velocity",),
        batch="batch_size",
        landmarks=LANDMARKS,
        factors=(*FACTORS, SIGN),
        build=sizes,
        traits=DATA_TRAITS,
        regimes=_regimes("data", "noise", exact=True),
        flops=flops,
        workloads=WORKLOADS,
        cases=0.5,
        rejections=(NO_BATCH,),
    )


@row
def rectified_flow_loss() -> Contract:
    """The row of `objectives.rectified_flow_loss`."""
    return Contract(
        name="objectives.rectified_flow_loss",
        summary="How far a predicted velocity is off, for each example.",
        formula="loss[b] = mean of (prediction[b] - velocity[b])**2",
        source=RECTIFIED_FLOW,
        reference=objectives.rectified_flow_loss,
        inputs=(PREDICTION, DATA, NOISE),
        outputs=(Output("loss", ("batch_size",), dtype="float32", differentiable=True),),
        options=("velocity",),
        batch="batch_size",
        landmarks=LANDMARKS,
        factors=(*FACTORS, SIGN),
        build=sizes,
        traits=DATA_TRAITS,
        regimes=_regimes("prediction", "data", "noise", exact=False),
        flops=flops,
        workloads=WORKLOADS,
        cases=0.5,
        rejections=(NO_BATCH,),
    )


@row
def rectified_flow_min_snr_weights() -> Contract:
    """The row of `objectives.rectified_flow_min_snr_weights`."""
    return Contract(
        name="objectives.rectified_flow_min_snr_weights",
        summary="Min-SNR weights along the straight way between data and noise; which ratio is meant has a name.",
        formula="snr = ((1 - t) / t)**2 and min-SNR weights; or q = (t / max(1 - t, 1e-8))**2 and min(q, gamma) / q",
        source="Hang et al. 2023 (arXiv:2303.09556) section 3.4; EasyDeL image_diffusion_trainer",
        reference=objectives.rectified_flow_min_snr_weights,
        inputs=(TIMES,),
        outputs=(Output("weights", ("batch_size",), dtype="float32"),),
        options=("prediction_type", "gamma", "snr"),
        batch="batch_size",
        dtypes=("float32",),
        landmarks=(weight_sizes(33), *(weight_sizes(33, kind, snr="noise over data") for kind in PREDICTIONS)),
        factors=(
            edges("batch_size", 1, 2, 3, 32, 65),
            either("prediction_type", *PREDICTIONS),
            either("gamma", 5.0, 1.0),
            either("snr", "data over noise", "noise over data"),
        ),
        build=weight_sizes,
        traits=TIME_TRAITS,
        regimes=(
            Regime("dithered", _only(("times",), times_of_batch), differentiable=False),
            Regime("adversarial", _only(("times",), near_ends), "worst element", differentiable=False),
        ),
        flops=lambda parameters: 6.0 * parameters["batch_size"],
        workloads=(Workload("dit-xl-2/batch-256", weight_sizes(256), "Hang et al. (arXiv:2303.09556) section 4.1"),),
        cases=0.2,
        rejections=(by_value("a time beyond noise", "times", {"times": 1.5}),),
        without={"gradients": "nothing has a gradient"},
    )


SHAPE = ("batch_size", "channels", "size")
DATA = Input("data", SHAPE, differentiable=True)
NOISE = Input("noise", SHAPE, differentiable=True)
TIMES = Input("times", ("batch_size",), dtype="float32")
PREDICTION = Input("prediction", SHAPE, differentiable=True)


def sizes(batch_size: int, channels: int, size: int, velocity: str = "noise - data") -> dict[str, Any]:
    """One point of the input space."""
    return {"batch_size": batch_size, "channels": channels, "size": size, "velocity": velocity}


FACTORS = (edges("batch_size", 1, 2, 3), edges("channels", 1, 2, 4), kinds("size", kind_of_width, 1, 15, 16, 64, 24, 65))
SIGN = either("velocity", "noise - data", "data - noise")


def _all(value: float, name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: torch.full_like(tensors[name], value)}


TIME_TRAITS = (Trait("0", "values of times", _all(0.0, "times")), Trait("1", "values of times", _all(1.0, "times")))
DATA_TRAITS = (Trait("0", "values of data", _all(0.0, "data")),)


PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def weight_sizes(
    batch_size: int, prediction_type: str = "flow_prediction", gamma: float = 5.0, snr: str = "data over noise"
) -> dict[str, Any]:
    """One point of the weights' input space."""
    return {"batch_size": batch_size, "prediction_type": prediction_type, "gamma": gamma, "snr": snr}


def times_of_batch(draw: Draw, parameters: Parameters) -> Tensors:
    """Times all along the way."""
    return {"times": draw.uniform(parameters["batch_size"])}


def near_ends(draw: Draw, parameters: Parameters) -> Tensors:
    """Times at the ends and near them."""
    nearly = torch.exp2(-2 - 14 * draw.uniform(parameters["batch_size"]))
    kinds = draw.integers(0, 4, parameters["batch_size"])
    ends = torch.stack([nearly, 1 - nearly, torch.zeros_like(nearly), torch.ones_like(nearly)])
    return {"times": ends.gather(0, kinds[None])[0]}


def flops(parameters: Parameters) -> float:
    """Three operations an element."""
    return 3.0 * parameters["batch_size"] * parameters["channels"] * parameters["size"]


def _numbers(draw: Draw, parameters: Parameters) -> torch.Tensor:
    return draw.normal(*(parameters[name] for name in SHAPE))


def dithered(draw: Draw, parameters: Parameters) -> Tensors:
    """Random images and noise, times all along the way."""
    tensors = {name: _numbers(draw, parameters) for name in ("prediction", "data", "noise")}
    return tensors | {"times": draw.uniform(parameters["batch_size"])}


def ends(draw: Draw, parameters: Parameters) -> Tensors:
    """Times at the ends and next to them, data that are nearly the noise."""
    tensors = dithered(draw, parameters)
    times = torch.tensor([0.0, 1.0, 2.0**-24, 1 - 2.0**-24], dtype=torch.float64)
    near = tensors["noise"] + 2.0**-6 * tensors["data"]
    return tensors | {"data": near, "times": times[draw.integers(0, 4, parameters["batch_size"])]}


def special(draw: Draw, parameters: Parameters) -> Tensors:
    """An image of NaN and one with an infinity."""
    tensors = dithered(draw, parameters)
    tensors["data"][parameters["batch_size"] // 2] = torch.nan
    tensors["data"][-1, 0, 0] = torch.inf
    return tensors


def lattice(draw: Draw, parameters: Parameters) -> Tensors:
    """Small integers and quarters of the way: all results are exact."""
    shape = [parameters[name] for name in SHAPE]
    data, noise = (draw.integers(-4, 5, *shape).to(torch.float64) for _ in range(2))
    return {"data": data, "noise": noise, "times": draw.integers(0, 5, parameters["batch_size"]) / 4}


def _only(names: tuple[str, ...], make: Callable[[Draw, Parameters], Tensors]) -> Callable[[Draw, Parameters], Tensors]:
    return lambda draw, parameters: {name: tensor for name, tensor in make(draw, parameters).items() if name in names}


def _regimes(*names: str, exact: bool) -> tuple[Regime, ...]:
    return (
        Regime("dithered", _only(names, dithered)),
        Regime("adversarial", _only(names, ends), "worst element"),
        Regime("special", _only(names, special), "worst element", differentiable=False),
        *([Regime("lattice", _only(names, lattice), "exact", differentiable=False)] if exact else []),
    )


def _batches_alone(call: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: call[name][:, 0, 0] for name in ("prediction", "data", "noise") if name in call}


NO_BATCH = Rejection("nothing but a batch", "data", _batches_alone)


LANDMARKS = (sizes(3, 4, 65), sizes(2, 3, 15, "data - noise"))
WORKLOADS = (
    Workload("dit-xl-2/latents-256", sizes(256, 4, 32 * 32), "Peebles and Xie 2022 (arXiv:2212.09748) section 4"),
    Workload("sd3/latents-1024", sizes(16, 16, 128 * 128), "stabilityai/stable-diffusion-3-medium transformer/config.json"),
)
RECTIFIED_FLOW = "Liu et al. 2022 (arXiv:2209.03003) section 2.1; Esser et al. 2024 (arXiv:2403.03206) section 2"
