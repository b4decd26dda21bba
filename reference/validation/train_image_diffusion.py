"""Calls of a training step on images."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import ClassModelConfig, FluxConfig, ImageDiffusionConfig, MMDiTConfig, UNetConfig
from gaugeblock.reference.validation.arrays import (
    INTEGER,
    dtype_name,
    require_dtype,
    require_same_device,
    require_shape,
    require_values,
)
from gaugeblock.reference.validation.training import training_state

Shapes = Mapping[str, tuple[int, ...]]


def image_diffusion_step(
    state: Any, images: Any, labels: Any, example_ids: Any, config: ImageDiffusionConfig, shapes: Shapes
) -> None:
    """Check the arguments of `train_image_diffusion.train_step`, whose model has parameters of these shapes."""
    image_diffusion_batch(images, labels, example_ids, config)
    require_examples(images)
    training_state(state, shapes, config, like=images)


def image_diffusion_step_on_texts(
    state: Any,
    images: Any,
    encoder_hidden_states: Any,
    pooled_projections: Any,
    example_ids: Any,
    config: ImageDiffusionConfig,
    shapes: Shapes,
    frozen: tuple[str, ...],
) -> None:
    """Check the arguments of `train_image_diffusion.train_step_on_texts`, whose model has parameters of these shapes."""
    image_diffusion_batch_on_texts(images, encoder_hidden_states, pooled_projections, example_ids, config)
    require_examples(images)
    training_state(state, shapes, config, frozen=frozen, like=images)


def require_examples(images: Any) -> None:
    """Check that a whole batch holds an example."""
    if images.shape[0] == 0:
        raise ValueError(f"images must hold at least one example, got {tuple(images.shape)}")


def image_diffusion_batch(images: Any, labels: Any, example_ids: Any, config: ImageDiffusionConfig) -> None:
    """Check a batch, or one rank's part of it, which may hold no example."""
    model = config.model
    if not isinstance(model, ClassModelConfig):
        raise ValueError(f"config.model must be told classes, got {type(model).__name__}, which is told texts")
    require_dtype("images", images, ("float32", "float64"))
    sizes = {"in_channels": model.in_channels, "height": model.input_size, "width": model.input_size}
    require_shape("images", images, batch_size=None, **sizes)
    for name, array in (("labels", labels), ("example_ids", example_ids)):
        require_dtype(name, array, (*INTEGER, "uint32"))
        require_shape(name, array, batch_size=images.shape[0])
        require_same_device(name, array, "images", images)
    require_values("labels", labels, model.num_classes - 1)


def image_diffusion_batch_on_texts(
    images: Any, encoder_hidden_states: Any, pooled_projections: Any, example_ids: Any, config: ImageDiffusionConfig
) -> None:
    """Check a batch, or one rank's part of it, which may hold no example."""
    model = config.model
    if isinstance(model, ClassModelConfig):
        raise ValueError(f"config.model must be told texts, got {type(model).__name__}, which is told classes")
    require_dtype("images", images, ("float32", "float64"))
    channels = model.in_channels // 4 if isinstance(model, FluxConfig) else model.in_channels  # Flux's are those of a patch
    require_shape("images", images, batch_size=None, in_channels=channels, height=None, width=None)
    width = model.cross_attention_dim if isinstance(model, UNetConfig) else model.joint_attention_dim
    texts = {"encoder_hidden_states": (encoder_hidden_states, {"text_length": None, "width": width})}
    if isinstance(model, FluxConfig | MMDiTConfig):
        texts["pooled_projections"] = (pooled_projections, {"width": model.pooled_projection_dim})
    elif pooled_projections is not None:
        raise TypeError(f"pooled_projections must be None for a UNet, got {type(pooled_projections).__name__}")
    for name, (array, sizes) in texts.items():
        require_dtype(name, array, (dtype_name(images),))
        require_shape(name, array, batch_size=images.shape[0], **sizes)
        require_same_device(name, array, "images", images)
    require_dtype("example_ids", example_ids, (*INTEGER, "uint32"))
    require_shape("example_ids", example_ids, batch_size=images.shape[0])
    require_same_device("example_ids", example_ids, "images", images)
