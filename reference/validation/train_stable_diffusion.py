"""Calls of the Stable Diffusion training step."""

from collections.abc import Collection, Mapping
from typing import Any

from gaugeblock.reference.configs import StableDiffusionConfig
from gaugeblock.reference.validation.arrays import (
    INTEGER,
    require_dtype,
    require_like,
    require_same_device,
    require_shape,
    state_entries,
)
from gaugeblock.reference.validation.clip_text import clip_input_ids_in_range
from gaugeblock.reference.validation.train_image_diffusion import require_examples
from gaugeblock.reference.validation.training import training_state

Shapes = Mapping[str, tuple[int, ...]]


def stable_diffusion_step(
    state: Any,
    frozen: Any,
    images: Any,
    input_ids: Any,
    time_ids: Any,
    example_ids: Any,
    config: StableDiffusionConfig,
    shapes: Shapes,
    frozen_shapes: Shapes,
    unused: Collection[str],
) -> None:
    """Check the arguments of `train_stable_diffusion.train_step`, whose parameters have these shapes."""
    stable_diffusion_batch(images, input_ids, time_ids, example_ids, config)
    require_examples(images)
    state_entries(frozen, frozen_shapes, like=images, name="frozen")
    training_state(state, shapes, config, frozen=unused, like=images)


def stable_diffusion_step_on_embeddings(
    state: Any,
    frozen: Any,
    images: Any,
    encoder_hidden_states: Any,
    text_embeds: Any,
    time_ids: Any,
    example_ids: Any,
    config: StableDiffusionConfig,
    shapes: Shapes,
    frozen_shapes: Shapes,
) -> None:
    """Check the arguments of `train_stable_diffusion.train_step_on_embeddings`, whose parameters have these shapes."""
    texts = encoder_hidden_states, text_embeds
    stable_diffusion_batch_on_embeddings(images, *texts, time_ids, example_ids, config)
    require_examples(images)
    state_entries(frozen, frozen_shapes, like=images, name="frozen")
    training_state(state, shapes, config, like=images)


def stable_diffusion_batch(images: Any, input_ids: Any, time_ids: Any, example_ids: Any, config: StableDiffusionConfig) -> None:
    """Check a batch, or one rank's part of it, which may hold no example."""
    if not config.text_encoders:
        raise ValueError("config.text_encoders must encode the captions, got (), a run on texts that are encoded already")
    require_images(images, example_ids, config)
    require_dtype("input_ids", input_ids, ("int32", "int64"))
    require_shape("input_ids", input_ids, batch_size=images.shape[0], num_encoders=len(config.text_encoders), num_tokens=None)
    require_same_device("input_ids", input_ids, "images", images)
    for index, encoder in enumerate(config.text_encoders):
        if not 1 <= input_ids.shape[2] <= encoder.max_position_embeddings:
            raise ValueError(f"input_ids must have 1..{encoder.max_position_embeddings} tokens, got {input_ids.shape[2]}")
        clip_input_ids_in_range(input_ids[:, index], encoder)
    require_like("time_ids", time_ids, "images", images, batch_size=images.shape[0], num_time_ids=config.num_time_ids)


def stable_diffusion_batch_on_embeddings(
    images: Any, encoder_hidden_states: Any, text_embeds: Any, time_ids: Any, example_ids: Any, config: StableDiffusionConfig
) -> None:
    """Check a batch whose captions are encoded already, or one rank's part of it, which may hold no example."""
    if config.train_text_encoder:
        raise ValueError("config.train_text_encoder must be False on texts that are encoded already: they pass on no gradients")
    require_images(images, example_ids, config)
    batch_size, width = images.shape[0], config.unet.cross_attention_dim
    require_like(
        "encoder_hidden_states", encoder_hidden_states, "images", images, batch_size=batch_size, num_tokens=None, width=width
    )
    each, together = config.unet.addition_time_embed_dim, config.unet.projection_class_embeddings_input_dim
    require_like("time_ids", time_ids, "images", images, batch_size=batch_size, num_time_ids=None if each else 0)
    if each:
        pooled_size = together - each * time_ids.shape[1]
        require_like("text_embeds", text_embeds, "images", images, batch_size=batch_size, pooled_size=pooled_size)
    elif text_embeds is not None:
        raise TypeError(f"text_embeds must be None for a UNet without added embeddings, got {type(text_embeds).__name__}")


def require_images(images: Any, example_ids: Any, config: StableDiffusionConfig) -> None:
    """Check images, or latents where there is no VAE, and the examples' ids."""
    require_dtype("images", images, ("float32", "float64"))
    channels = config.unet.in_channels if config.vae is None else config.vae.in_channels
    require_shape("images", images, batch_size=None, in_channels=channels, height=None, width=None)
    least = 1 if config.vae is None else config.vae.downsampling
    if min(images.shape[2:]) < least:
        raise ValueError(f"images must have a height and a width of at least {least}, got {tuple(images.shape)}")
    require_dtype("example_ids", example_ids, (*INTEGER, "uint32"))
    require_shape("example_ids", example_ids, batch_size=images.shape[0])
    require_same_device("example_ids", example_ids, "images", images)
