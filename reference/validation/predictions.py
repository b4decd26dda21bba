"""Calls of predictions."""

from typing import Any

from gaugeblock.reference.configs import PredictionType
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_dtype,
    require_interval,
    require_one_of,
    require_positive,
    require_same_device,
    require_shape,
)

# What a difference is divided by where a prediction tells one of the two alone.
DIVISORS = {"epsilon": "alphas", "sample": "sigmas"}


def pair(first_name: str, first: Any, second_name: str, second: Any) -> None:
    """Check two floating arrays of one dtype and shape, [batch_size, ...]."""
    require_dtype(first_name, first, FLOATING)
    if len(first.shape) < 2:
        raise ValueError(f"{first_name} must be [batch_size, ...], got {tuple(first.shape)}")
    require_dtype(second_name, second, (str(first.dtype).removeprefix("torch."),))
    if tuple(second.shape) != tuple(first.shape):
        raise ValueError(f"{second_name} must be of the shape of {first_name} {tuple(first.shape)}, got {tuple(second.shape)}")
    require_same_device(second_name, second, first_name, first)


def rates(alphas: Any, sigmas: Any, like_name: str, like: Any, positive: str = "") -> None:
    """Check how much there is of data and of noise in each example; the rate of the name `positive` may not be 0."""
    for name, array in (("alphas", alphas), ("sigmas", sigmas)):
        per_example(name, array, like_name, like)
        require_interval(name, array, 0, float("inf"), low_excluded=name == positive, high_excluded=True)


def per_example(name: str, array: Any, like_name: str, like: Any) -> None:
    """Check a number of each example."""
    require_dtype(name, array, ("float32", "float64"))
    require_shape(name, array, batch_size=like.shape[0])
    require_same_device(name, array, like_name, like)


def add_noise(data: Any, noise: Any, alphas: Any, sigmas: Any) -> None:
    """Check the arguments of `predictions.add_noise`."""
    pair("data", data, "noise", noise)
    rates(alphas, sigmas, "data", data)


def prediction_target(data: Any, noise: Any, alphas: Any, sigmas: Any, prediction_type: Any) -> None:
    """Check the arguments of `predictions.prediction_target`."""
    add_noise(data, noise, alphas, sigmas)
    require_one_of("prediction_type", prediction_type, PredictionType)


def convert_prediction(prediction: Any, noised: Any, alphas: Any, sigmas: Any, prediction_type: Any, to: Any) -> None:
    """Check the arguments of `predictions.convert_prediction`; a prediction that says nothing of the other kind is refused."""
    pair("prediction", prediction, "noised", noised)
    require_one_of("prediction_type", prediction_type, PredictionType)
    require_one_of("to", to, PredictionType)
    rates(alphas, sigmas, "prediction", prediction, "" if prediction_type == to else DIVISORS.get(prediction_type, ""))


def min_snr_weights(snr: Any, prediction_type: Any, gamma: Any) -> None:
    """Check the arguments of `predictions.min_snr_weights`."""
    require_dtype("snr", snr, ("float32", "float64"))
    require_shape("snr", snr, batch_size=None)
    require_interval("snr", snr, 0, float("inf"))
    require_one_of("prediction_type", prediction_type, PredictionType)
    require_positive("gamma", gamma)
