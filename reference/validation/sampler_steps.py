"""Calls of the steps of samplers."""

from typing import Any, get_args

from gaugeblock.reference.configs import LARGEST_CHURN, DiffusionScheduleConfig, EDMScheduleConfig, PredictionType
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_dtype,
    require_interval,
    require_number,
    require_positive,
    require_same_device,
)
from gaugeblock.reference.validation.noise_schedules import schedule_config
from gaugeblock.reference.validation.predictions import pair, per_example


def ddpm_step(noised: Any, prediction: Any, noise: Any, alphas_cumprod: Any, previous_alphas_cumprod: Any, config: Any) -> None:
    """Check the arguments of `sampler_steps.ddpm_step`."""
    schedule_config(config, DiffusionScheduleConfig)
    pair("noised", noised, "noise", noise)
    if config.variance_type != "learned_range":
        pair("noised", noised, "prediction", prediction)
    else:
        require_dtype("prediction", prediction, (str(noised.dtype).removeprefix("torch."),))
        batch_size, channels, *sizes = noised.shape
        if tuple(prediction.shape) != (batch_size, 2 * channels, *sizes):
            wanted = batch_size, 2 * channels, *sizes
            raise ValueError(f"prediction must have twice as many channels as noised, {wanted}, got {tuple(prediction.shape)}")
        require_same_device("prediction", prediction, "noised", noised)
    _rates(noised, alphas_cumprod, previous_alphas_cumprod, config)


def ddim_step(
    noised: Any,
    prediction: Any,
    noise: Any,
    alphas_cumprod: Any,
    previous_alphas_cumprod: Any,
    config: Any,
    eta: Any,
    use_clipped_model_output: Any,
) -> None:
    """Check the arguments of `sampler_steps.ddim_step`."""
    schedule_config(config, DiffusionScheduleConfig)
    pair("noised", noised, "prediction", prediction)
    pair("noised", noised, "noise", noise)
    require_number("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    _require_bool("use_clipped_model_output", use_clipped_model_output)
    _rates(noised, alphas_cumprod, previous_alphas_cumprod, config)


def dynamic_threshold(data: Any, ratio: Any, max_value: Any) -> None:
    """Check the arguments of `sampler_steps.dynamic_threshold`."""
    require_dtype("data", data, FLOATING)
    if len(data.shape) < 2:
        raise ValueError(f"data must be [batch_size, ...], got {tuple(data.shape)}")
    require_positive("ratio", ratio)
    if ratio > 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    require_number("max_value", max_value)
    if max_value < 1:
        raise ValueError(f"max_value must be at least 1, got {max_value}")


def euler_step(
    noised: Any,
    prediction: Any,
    noise: Any,
    sigmas: Any,
    next_sigmas: Any,
    prediction_type: Any,
    churn: Any,
    noise_scale: Any,
) -> None:
    """Check the arguments of `sampler_steps.euler_step`."""
    pair("noised", noised, "prediction", prediction)
    pair("noised", noised, "noise", noise)
    _sigmas(noised, sigmas, next_sigmas, last_included=True)
    allowed = get_args(PredictionType)[:-1]
    if prediction_type not in allowed:
        raise ValueError(f"prediction_type must be {' or '.join(map(repr, allowed))}, got {prediction_type!r}")
    _churn(churn, noise_scale)


def heun_step(
    noised: Any, prediction: Any, euler_noised: Any, euler_prediction: Any, sigmas: Any, next_sigmas: Any, config: Any
) -> None:
    """Check the arguments of `sampler_steps.heun_step`."""
    schedule_config(config, DiffusionScheduleConfig)
    for name, array in (("prediction", prediction), ("euler_noised", euler_noised), ("euler_prediction", euler_prediction)):
        pair("noised", noised, name, array)
    _sigmas(noised, sigmas, next_sigmas, last_included=False)


def heun_predictor(noised: Any, prediction: Any, sigmas: Any, next_sigmas: Any, config: Any) -> None:
    """Check the arguments of `sampler_steps.heun_predictor`."""
    schedule_config(config, DiffusionScheduleConfig)
    pair("noised", noised, "prediction", prediction)
    _sigmas(noised, sigmas, next_sigmas, last_included=True)


def edm_step(
    noised: Any, prediction: Any, noise: Any, sigmas: Any, next_sigmas: Any, config: Any, churn: Any, noise_scale: Any
) -> None:
    """Check the arguments of `sampler_steps.edm_step`."""
    schedule_config(config, EDMScheduleConfig)
    euler_step(noised, prediction, noise, sigmas, next_sigmas, config.prediction_type, churn, noise_scale)


def flow_step(noised: Any, prediction: Any, noise: Any, sigmas: Any, next_sigmas: Any, stochastic_sampling: Any) -> None:
    """Check the arguments of `sampler_steps.flow_step`."""
    pair("noised", noised, "prediction", prediction)
    pair("noised", noised, "noise", noise)
    for name, array in (("sigmas", sigmas), ("next_sigmas", next_sigmas)):
        per_example(name, array, "noised", noised)
        require_interval(name, array, 0, 1)
    _require_bool("stochastic_sampling", stochastic_sampling)


def _rates(noised: Any, alphas_cumprod: Any, previous_alphas_cumprod: Any, config: DiffusionScheduleConfig) -> None:
    per_example("alphas_cumprod", alphas_cumprod, "noised", noised)
    per_example("previous_alphas_cumprod", previous_alphas_cumprod, "noised", noised)
    # nothing of the data is left at 0, and a predicted noise says nothing of them
    nothing_left = config.prediction_type == "epsilon"
    require_interval("alphas_cumprod", alphas_cumprod, 0, 1, low_excluded=nothing_left, high_excluded=True)
    require_interval("previous_alphas_cumprod", previous_alphas_cumprod, 0, 1, low_excluded=True)


def _sigmas(noised: Any, sigmas: Any, next_sigmas: Any, *, last_included: bool) -> None:
    infinity = float("inf")
    for name, array, low_excluded in (("sigmas", sigmas, True), ("next_sigmas", next_sigmas, not last_included)):
        per_example(name, array, "noised", noised)
        require_interval(name, array, 0, infinity, low_excluded=low_excluded, high_excluded=True)


def _churn(churn: Any, noise_scale: Any) -> None:
    require_number("churn", churn)
    if not 0 <= churn <= LARGEST_CHURN:
        raise ValueError(f"churn must be in [0, sqrt(2) - 1], got {churn}")
    require_positive("noise_scale", noise_scale)


def _require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")
