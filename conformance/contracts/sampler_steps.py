"""Contracts of the steps of samplers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from gaugeblock.conformance.contracts.noised_examples import (
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
from gaugeblock.conformance.engine.contract import Contract, Derived, Input, Output, Regime, Rejection, row
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors
from gaugeblock.reference.configs import DiffusionScheduleConfig, EDMScheduleConfig
from gaugeblock.reference.torch import sampler_steps


@row
def ddpm_step() -> Contract:
    """The row of `sampler_steps.ddpm_step`."""
    sizes = builder(prediction_type="epsilon", variance_type="fixed_small", clip_sample=False, thresholding=False)
    return Contract(
        name="sampler_steps.ddpm_step",
        summary="Draws the less noised example, given this one and the data that the model predicts.",
        formula="sqrt(p) beta / (1 - a) data + sqrt(a / p) (1 - p) / (1 - a) noised + sqrt(variance) noise,  beta = 1 - a / p",
        source="Ho et al. 2020 (arXiv:2006.11239) equation 7; Nichol and Dhariwal 2021 (arXiv:2102.09672) equation 15",
        reference=sampler_steps.ddpm_step,
        inputs=(NOISED, PREDICTED_WITH_VARIANCE, *arrays("noise", "alphas_cumprod", "previous_alphas_cumprod")),
        outputs=OUTPUTS,
        options=("config",),
        configure=lambda parameters: {"config": diffusion(parameters)},
        batch="batch_size",
        landmarks=(
            sizes(3, 4, 65),
            sizes(2, 3, 16, prediction_type="v_prediction", variance_type="fixed_large"),
            sizes(3, 2, 24, variance_type="learned_range"),
            sizes(3, 2, 33, prediction_type="sample", clip_sample=True),
            sizes(2, 4, 33, thresholding=True),
        ),
        factors=options_of(prediction_type=KINDS, variance_type=VARIANCES, **CLIPPINGS),
        build=sizes,
        traits=(LAST,),
        regimes=_regimes(mixed, next_to_each_other, "noised", "prediction", "noise"),
        flops=lambda parameters: 5 * elements(parameters),
        workloads=workloads(sizes),
        cases=0.3,
        rejections=(*RATES, EXAMPLES, OTHER_CONFIG),
    )


@row
def ddim_step() -> Contract:
    """The row of `sampler_steps.ddim_step`."""
    sizes = builder(prediction_type="epsilon", eta=0.0, use_clipped_model_output=False, clip_sample=False, thresholding=False)
    return Contract(
        name="sampler_steps.ddim_step",
        summary="Takes the predicted noise away and puts less of it back, a part of it anew.",
        formula="sqrt(p) data + sqrt(1 - p - s**2) epsilon + s noise,  s**2 = eta**2 (1 - p) / (1 - a) (1 - a / p)",
        source="Song et al. 2021 (arXiv:2010.02502) equations 12 and 16",
        reference=sampler_steps.ddim_step,
        inputs=arrays("noised", "prediction", "noise", "alphas_cumprod", "previous_alphas_cumprod"),
        outputs=OUTPUTS,
        options=("config", "eta", "use_clipped_model_output"),
        configure=lambda parameters: {"config": diffusion(parameters)} | _some(parameters, "eta", "use_clipped_model_output"),
        batch="batch_size",
        landmarks=(
            sizes(3, 4, 65),
            sizes(2, 3, 16, prediction_type="v_prediction", eta=1.0),
            sizes(3, 2, 24, clip_sample=True, use_clipped_model_output=True, eta=0.5),
            sizes(3, 2, 33, prediction_type="sample", thresholding=True),
        ),
        factors=options_of(prediction_type=KINDS, eta=(0.0, 0.5, 1.0), use_clipped_model_output=(False, True), **CLIPPINGS),
        build=sizes,
        traits=(LAST,),
        regimes=_regimes(mixed, next_to_each_other, "noised", "prediction", "noise"),
        flops=lambda parameters: 5 * elements(parameters),
        workloads=workloads(sizes),
        cases=0.3,
        rejections=(*RATES, EXAMPLES, OTHER_CONFIG, _number_for("use_clipped_model_output")),
    )


@row
def euler_step() -> Contract:
    """The row of `sampler_steps.euler_step`."""
    sizes = builder(prediction_type="epsilon", churn=0.0, noise_scale=1.0)
    return Contract(
        name="sampler_steps.euler_step",
        summary="Adds noise, as much as churn says, and follows the slope at it to the next sigma.",
        formula="h = sigma (1 + churn), x = noised + noise_scale sqrt(h**2 - sigma**2) noise: x + (x - data) / h (next - h)",
        source="Karras et al. 2022 (arXiv:2206.00364) algorithm 2; diffusers EulerDiscreteScheduler",
        reference=sampler_steps.euler_step,
        inputs=arrays("noised", "prediction", "noise", "sigmas", "next_sigmas"),
        outputs=OUTPUTS,
        options=("prediction_type", "churn", "noise_scale"),
        batch="batch_size",
        landmarks=(
            sizes(3, 4, 65),
            sizes(2, 3, 16, prediction_type="v_prediction"),
            sizes(3, 2, 33, prediction_type="v_prediction", churn=0.375),
            sizes(3, 2, 24, prediction_type="sample", churn=0.25, noise_scale=1.5),
        ),
        factors=options_of(prediction_type=KINDS, churn=(0.0, 0.25, 0.375), noise_scale=(1.0, 1.5)),
        build=sizes,
        traits=(TO_DATA,),
        regimes=_regimes(apart, close, "noised", "prediction", "noise"),
        flops=lambda parameters: 6 * elements(parameters),
        workloads=workloads(sizes),
        cases=0.3,
        rejections=(*SIGMAS, *CHURNS, EXAMPLES, FLOWS),
    )


@row
def heun_step() -> Contract:
    """The row of `sampler_steps.heun_step`."""
    sizes = builder(prediction_type="epsilon", clip_sample=False)
    return Contract(
        name="sampler_steps.heun_step",
        summary="Follows the mean of two slopes: that at this sigma, and that where it leads to at the next one.",
        formula="noised + ((noised - data) / sigma + (euler_noised - euler_data) / next_sigma) / 2 (next_sigma - sigma)",
        source="Karras et al. 2022 (arXiv:2206.00364) algorithm 1",
        reference=sampler_steps.heun_step,
        inputs=arrays("noised", "prediction", "euler_noised", "euler_prediction", "sigmas", "next_sigmas"),
        outputs=OUTPUTS,
        options=("config",),
        configure=lambda parameters: {"config": diffusion(parameters)},
        batch="batch_size",
        landmarks=(
            sizes(2, 3, 16, prediction_type="v_prediction"),  # which slopes depend on noised; of epsilon they do not
            sizes(3, 4, 65),
            sizes(3, 2, 33, prediction_type="v_prediction", clip_sample=True),
            sizes(3, 2, 24, prediction_type="sample"),
        ),
        factors=options_of(prediction_type=KINDS, clip_sample=(False, True)),
        build=sizes,
        regimes=_regimes(apart, close, "noised", "prediction", "euler_noised", "euler_prediction"),
        flops=lambda parameters: 10 * elements(parameters),
        workloads=workloads(sizes),
        cases=0.3,
        rejections=(*SIGMAS, by_value("a step to the data", "next_sigmas", {"next_sigmas": 0.0}), EXAMPLES, OTHER_CONFIG),
    )


@row
def edm_step() -> Contract:
    """The row of `sampler_steps.edm_step`."""
    sizes = builder(prediction_type="epsilon", sigma_data=0.5, churn=0.0, noise_scale=1.0)
    return Contract(
        name="sampler_steps.edm_step",
        summary="Makes Euler's step with a model whose inputs and outputs are scaled.",
        formula="data = d**2 / (h**2 + d**2) x ± h d / sqrt(h**2 + d**2) prediction: x + (x - data) / h (next_sigma - h)",
        source="Karras et al. 2022 (arXiv:2206.00364) equation 7 and table 1",
        reference=sampler_steps.edm_step,
        inputs=arrays("noised", "prediction", "noise", "sigmas", "next_sigmas"),
        outputs=OUTPUTS,
        options=("config", "churn", "noise_scale"),
        configure=lambda parameters: (
            {"config": EDMScheduleConfig(**_some(parameters, "prediction_type", "sigma_data"))}
            | _some(parameters, "churn", "noise_scale")
        ),
        batch="batch_size",
        landmarks=(sizes(3, 4, 65), sizes(2, 3, 16, prediction_type="v_prediction", sigma_data=1.0, churn=0.375)),
        factors=options_of(
            prediction_type=("epsilon", "v_prediction"), sigma_data=(0.5, 1.0), churn=(0.0, 0.375), noise_scale=(1.0, 1.5)
        ),
        build=sizes,
        traits=(TO_DATA,),
        regimes=_regimes(apart, close, "noised", "prediction", "noise"),
        flops=lambda parameters: 6 * elements(parameters),
        workloads=workloads(sizes),
        cases=0.3,
        rejections=(*SIGMAS, *CHURNS, EXAMPLES, OTHER_CONFIG),
    )


@row
def flow_step() -> Contract:
    """The row of `sampler_steps.flow_step`."""
    sizes = builder(stochastic_sampling=False)
    return Contract(
        name="sampler_steps.flow_step",
        summary="Follows a flow's velocity to the next sigma, or predicts the data and noises them anew.",
        formula="noised + (next - sigma) prediction; or (1 - next) (noised - sigma prediction) + next noise",
        source="Liu et al. 2022 (arXiv:2209.03003) section 2.1; diffusers FlowMatchEulerDiscreteScheduler",
        reference=sampler_steps.flow_step,
        # the noise is of no use to one of the two ways, and has no gradient there
        inputs=(*arrays("noised", "prediction"), Input("noise", SHAPE), *arrays("sigmas", "next_sigmas")),
        outputs=OUTPUTS,
        options=("stochastic_sampling",),
        batch="batch_size",
        landmarks=(sizes(3, 4, 65), sizes(2, 3, 16, stochastic_sampling=True)),
        factors=options_of(stochastic_sampling=(False, True)),
        build=sizes,
        traits=(TO_DATA, all_equal("sigmas", sigmas=1.0)),
        regimes=_regimes(on_the_way, nearly_there, "noised", "prediction", "noise"),
        flops=lambda parameters: 2 * elements(parameters),
        workloads=workloads(sizes),
        cases=0.3,
        rejections=(
            by_value("more than nothing but noise", "sigmas", {"sigmas": 1.5}),
            by_value("more than data", "next_sigmas", {"next_sigmas": -0.5}),
            EXAMPLES,
            _number_for("stochastic_sampling"),
        ),
    )


KINDS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
CLIPPINGS: Mapping[str, tuple[bool, ...]] = {"clip_sample": (False, True), "thresholding": (False, True)}


def diffusion(parameters: Parameters) -> DiffusionScheduleConfig:
    """The config at given parameters; data are clipped to other numbers than by default."""
    return DiffusionScheduleConfig(
        **_some(parameters, "prediction_type", "variance_type", *CLIPPINGS),
        clip_sample_range=0.75,
        dynamic_thresholding_ratio=0.875,
        sample_max_value=2.0,
    )


def _number_for(truth_value: str) -> Rejection:
    """A call in which 1 stands for True."""
    return Rejection(f"a number for {truth_value}", truth_value, lambda call: {truth_value: 1})


def _of_another_kind(call: Mapping[str, Any]) -> Mapping[str, Any]:
    of_diffusion = isinstance(call["config"], DiffusionScheduleConfig)
    return {"config": EDMScheduleConfig() if of_diffusion else DiffusionScheduleConfig()}


def _some(parameters: Parameters, *names: str) -> dict[str, Any]:
    return {name: parameters[name] for name in names if name in parameters}


def _predicted_channels(parameters: Parameters) -> int:
    return int(parameters["channels"] * (2 if parameters["variance_type"] == "learned_range" else 1))


PREDICTED_WITH_VARIANCE = Input(
    "prediction", ("batch_size", Derived("predicted_channels", _predicted_channels), "size"), differentiable=True
)
NOISED, OUTPUTS = arrays("noised")[0], (Output("less_noised", SHAPE, differentiable=True),)


def mixed(draw: Draw, parameters: Parameters) -> Tensors:
    """Steps of any length, anywhere between noise and data."""
    both = (0.01 + 0.96 * draw.uniform(parameters["batch_size"], 2)).sort(-1).values
    return {"alphas_cumprod": both[:, 0] * 0.9, "previous_alphas_cumprod": both[:, 1]}


def next_to_each_other(draw: Draw, parameters: Parameters) -> Tensors:
    """Steps of a thousandth, near the noise and near the data."""
    nearly = torch.exp2(-2 - 8 * draw.uniform(parameters["batch_size"]))
    alphas = torch.where(draw.integers(0, 2, parameters["batch_size"]) == 1, nearly, 1 - nearly)
    return {"alphas_cumprod": alphas, "previous_alphas_cumprod": alphas + (1 - alphas) / 64}


def apart(draw: Draw, parameters: Parameters) -> Tensors:
    """Sigmas from a tenth to ten, in steps of any length."""
    both = (10 ** (2 * draw.uniform(parameters["batch_size"], 2) - 1)).sort(-1, descending=True).values
    return {"sigmas": both[:, 0], "next_sigmas": both[:, 1]}


def close(draw: Draw, parameters: Parameters) -> Tensors:
    """Small and large sigmas, next to each other."""
    sigmas = 10 ** (4 * draw.uniform(parameters["batch_size"]) - 2)
    return {"sigmas": sigmas, "next_sigmas": sigmas * (1 - 2.0**-7)}


def on_the_way(draw: Draw, parameters: Parameters) -> Tensors:
    """Sigmas of a flow, in steps of any length."""
    both = draw.uniform(parameters["batch_size"], 2).sort(-1, descending=True).values
    return {"sigmas": both[:, 0], "next_sigmas": both[:, 1]}


def nearly_there(draw: Draw, parameters: Parameters) -> Tensors:
    """Sigmas near the data and near the noise, next to each other."""
    nearly = torch.exp2(-4 - 16 * draw.uniform(parameters["batch_size"]))
    sigmas = torch.where(draw.integers(0, 2, parameters["batch_size"]) == 1, nearly, 1 - nearly)
    return {"sigmas": sigmas, "next_sigmas": sigmas * (1 - 2.0**-7)}


Numbers = Callable[[Draw, Parameters], Tensors]


def _regimes(usual: Numbers, hard: Numbers, *names: str) -> tuple[Regime, ...]:
    def arrays_of(draw: Draw, parameters: Parameters) -> Tensors:
        made = examples(draw, parameters, *names)
        if "variance_type" in parameters:
            made["prediction"] = draw.normal(parameters["batch_size"], _predicted_channels(parameters), parameters["size"])
        return made

    def dithered(draw: Draw, parameters: Parameters) -> Tensors:
        return arrays_of(draw, parameters) | usual(draw, parameters)

    def adversarial(draw: Draw, parameters: Parameters) -> Tensors:
        return arrays_of(draw, parameters) | hard(draw, parameters)

    def special(draw: Draw, parameters: Parameters) -> Tensors:
        return with_bad_ones(dithered(draw, parameters), "noised")

    return (
        Regime("dithered", dithered),
        Regime("adversarial", adversarial, "worst element", differentiable=False),
        Regime("special", special, "worst element", differentiable=False),
    )


LAST = all_equal("the step", previous_alphas_cumprod=1.0)
TO_DATA = all_equal("the step", next_sigmas=0.0)
RATES = (
    by_value("nothing but data", "alphas_cumprod", {"alphas_cumprod": 1.0}),
    by_value("less than nothing of the data", "alphas_cumprod", {"alphas_cumprod": -0.5}),
    by_value("a step to noise alone", "previous_alphas_cumprod", {"previous_alphas_cumprod": 0.0}),
    by_value("more than data", "previous_alphas_cumprod", {"previous_alphas_cumprod": 1.5}),
    Rejection(
        "predicted noise where there is nothing else",
        "alphas_cumprod",
        lambda call: {
            "config": replace(call["config"], prediction_type="epsilon"),
            "alphas_cumprod": torch.zeros_like(call["alphas_cumprod"]),
        },
        by_values=True,
    ),
)
EXAMPLES = without_axes("noised")
OTHER_CONFIG = Rejection("a config of another kind", "config", _of_another_kind)
FLOWS = Rejection("a flow's prediction", "prediction_type", lambda call: {"prediction_type": "flow_prediction"})
CHURNS = (
    Rejection("more churn than is left", "churn", lambda call: {"churn": 0.5}),
    Rejection("less churn than none", "churn", lambda call: {"churn": -0.25}),
)
SIGMAS = (
    by_value("no noise", "sigmas", {"sigmas": 0.0}),
    by_value("infinite noise", "sigmas", {"sigmas": math.inf}),
    by_value("a step beyond the data", "next_sigmas", {"next_sigmas": -1.0}),
)
