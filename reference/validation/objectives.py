"""Calls of objectives."""

from typing import Any

from gaugeblock.reference.configs import FlowWeighting, PredictionType, SnrOfTimes, VelocitySign
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_dtype,
    require_interval,
    require_one_of,
    require_positive,
    require_same_device,
    require_shape,
)


def rectified_flow(data: Any, noise: Any) -> None:
    """Check the data and the noise of the functions of `objectives`."""
    require_dtype("data", data, FLOATING)
    if len(data.shape) < 2:
        raise ValueError(f"data must be [batch_size, ...], got {tuple(data.shape)}")
    require_like_data("noise", noise, data)


def rectified_flow_times(times: Any, data: Any) -> None:
    """Check the times of `objectives.rectified_flow_interpolate`."""
    require_dtype("times", times, FLOATING)
    require_shape("times", times, batch_size=data.shape[0])
    require_same_device("times", times, "data", data)


def rectified_flow_prediction(prediction: Any, data: Any) -> None:
    """Check the prediction of `objectives.rectified_flow_loss`."""
    require_like_data("prediction", prediction, data)


def velocity_sign(velocity: Any) -> None:
    """Check which way a velocity is said to point."""
    require_one_of("velocity", velocity, VelocitySign)


def rectified_flow_min_snr_weights(times: Any, prediction_type: Any, gamma: Any, snr: Any) -> None:
    """Check the arguments of `objectives.rectified_flow_min_snr_weights`."""
    _times_alone(times)
    require_one_of("prediction_type", prediction_type, PredictionType)
    require_positive("gamma", gamma)
    require_one_of("snr", snr, SnrOfTimes)


def rectified_flow_weights(times: Any, weighting: Any) -> None:
    """Check the arguments of `objectives.rectified_flow_weights`."""
    require_one_of("weighting", weighting, FlowWeighting)
    _times_alone(times, low_excluded=weighting == "sigma_sqrt")


def _times_alone(times: Any, *, low_excluded: bool = False) -> None:
    require_dtype("times", times, ("float32", "float64"))
    require_shape("times", times, batch_size=None)
    require_interval("times", times, 0, 1, low_excluded=low_excluded)


def require_like_data(name: str, array: Any, data: Any) -> None:
    """Check that an array is a floating one with the shape and on the device of `data`."""
    require_dtype(name, array, FLOATING)
    if tuple(array.shape) != tuple(data.shape):
        raise ValueError(f"{name} must be of the shape of data {tuple(data.shape)}, got {tuple(array.shape)}")
    require_same_device(name, array, "data", data)
