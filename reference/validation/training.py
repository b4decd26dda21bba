"""Calls of objectives, samplers and training steps."""

from collections.abc import Mapping
from typing import Any, get_args

from gaugeblock.reference.configs import DiTConfig, VelocitySign
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    require_between,
    require_dtype,
    require_entry_names,
    require_same_device,
    require_shape,
    require_values,
    state_entries,
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
    if velocity not in get_args(VelocitySign):
        raise ValueError(f"velocity must be {' or '.join(map(repr, get_args(VelocitySign)))}, got {velocity!r}")


def euler_sample(noise: Any, labels: Any, num_steps: Any, velocity: Any) -> None:
    """Check the arguments of `samplers.euler_sample`."""
    require_dtype("noise", noise, ("float32", "float64"))
    if len(noise.shape) < 2:
        raise ValueError(f"noise must be [batch_size, ...], got {tuple(noise.shape)}")
    require_dtype("labels", labels, INTEGER)
    require_shape("labels", labels, batch_size=noise.shape[0])
    require_between("num_steps", num_steps, 1, 2**31 - 1)
    velocity_sign(velocity)


def image_diffusion_step(
    state: Any, images: Any, labels: Any, example_ids: Any, model: DiTConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the arguments of `train_image_diffusion.train_step`, whose model has parameters of these shapes."""
    image_diffusion_batch(images, labels, example_ids, model)
    if images.shape[0] == 0:
        raise ValueError(f"images must hold at least one example, got {tuple(images.shape)}")
    image_diffusion_state(state, shapes, like=images)


def image_diffusion_batch(images: Any, labels: Any, example_ids: Any, model: DiTConfig) -> None:
    """Check a batch, or one rank's part of it, which may hold no example."""
    require_dtype("images", images, ("float32", "float64"))
    sizes = {"in_channels": model.in_channels, "height": model.input_size, "width": model.input_size}
    require_shape("images", images, batch_size=None, **sizes)
    for name, array in (("labels", labels), ("example_ids", example_ids)):
        require_dtype(name, array, (*INTEGER, "uint32"))
        require_shape(name, array, batch_size=images.shape[0])
        require_same_device(name, array, "images", images)
    require_values("labels", labels, model.num_classes - 1)


def image_diffusion_state(state: Any, shapes: Mapping[str, tuple[int, ...]], like: Any = None) -> None:
    """Check the state of a run: parameters of these shapes, dtype and device of `like` (default: of its first entry)."""
    parts = {f"{part}.{name}": shape for part in ("model", "exp_avg", "exp_avg_sq") for name, shape in shapes.items()}
    require_entry_names("state", state, (*parts, "step"))
    if like is None:
        first = next(iter(parts))
        like = state[first]
        require_dtype(f"state[{first!r}]", like, ("float32", "float64"))
    state_entries({name: state[name] for name in parts}, parts, like=like)
    require_dtype("state['step']", state["step"], INTEGER)
    require_shape("state['step']", state["step"])


def require_like_data(name: str, array: Any, data: Any) -> None:
    """Check that an array is a floating one with the shape and on the device of `data`."""
    require_dtype(name, array, FLOATING)
    if tuple(array.shape) != tuple(data.shape):
        raise ValueError(f"{name} must be of the shape of data {tuple(data.shape)}, got {tuple(array.shape)}")
    require_same_device(name, array, "data", data)
