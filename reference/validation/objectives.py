"""Calls of objectives."""

from typing import Any

from gaugeblock.reference.configs import VelocitySign
from gaugeblock.reference.validation.arrays import FLOATING, require_dtype, require_one_of, require_same_device, require_shape


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


def require_like_data(name: str, array: Any, data: Any) -> None:
    """Check that an array is a floating one with the shape and on the device of `data`."""
    require_dtype(name, array, FLOATING)
    if tuple(array.shape) != tuple(data.shape):
        raise ValueError(f"{name} must be of the shape of data {tuple(data.shape)}, got {tuple(array.shape)}")
    require_same_device(name, array, "data", data)
