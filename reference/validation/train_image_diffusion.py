"""Calls of a training step on images."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.validation.arrays import (
    INTEGER,
    require_dtype,
    require_entry_names,
    require_same_device,
    require_shape,
    require_values,
    state_entries,
)


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
