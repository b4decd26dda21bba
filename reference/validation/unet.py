"""Calls of the UNets."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import UNetConfig
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_dtype,
    require_like,
    require_same_device,
    require_shape,
    state_entries,
)

TIMES = ("float32", "float64")


def unet(
    state: Any,
    latents: Any,
    timesteps: Any,
    encoder_hidden_states: Any,
    encoder_attention_mask: Any,
    config: UNetConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the arguments of `unet.unet`, whose parameters have these shapes."""
    if config.addition_time_embed_dim:
        raise ValueError("config must be a model without added embeddings, got one for unet_text_time")
    require_unet(state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config, shapes)


def unet_text_time(
    state: Any,
    latents: Any,
    timesteps: Any,
    encoder_hidden_states: Any,
    text_embeds: Any,
    time_ids: Any,
    encoder_attention_mask: Any,
    config: UNetConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the arguments of `unet.unet_text_time`, whose parameters have these shapes."""
    if not config.addition_time_embed_dim:
        raise ValueError("config must be a model with added embeddings, got one for unet")
    require_unet(state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config, shapes)
    batch_size = latents.shape[0]
    require_dtype("time_ids", time_ids, TIMES)
    require_shape("time_ids", time_ids, batch_size=batch_size, num_time_ids=None)
    require_same_device("time_ids", time_ids, "latents", latents)
    require_like("text_embeds", text_embeds, "latents", latents, batch_size=batch_size, text_embed_dim=None)
    each, together = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
    width, count = text_embeds.shape[1], time_ids.shape[1]
    if width + count * each != together:
        raise ValueError(
            f"text_embeds and time_ids must be of text_embed_dim and num_time_ids such that "
            f"text_embed_dim + {each} * num_time_ids = {together}, got {width} and {count}"
        )


def require_unet(
    state: Any,
    latents: Any,
    timesteps: Any,
    encoder_hidden_states: Any,
    encoder_attention_mask: Any,
    config: UNetConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the arguments that all UNets have."""
    require_dtype("latents", latents, FLOATING)
    require_shape("latents", latents, batch_size=None, in_channels=config.in_channels, height=None, width=None)
    if 0 in latents.shape[2:]:
        raise ValueError(f"latents must have a height and a width of at least 1, got {tuple(latents.shape)}")
    batch_size = latents.shape[0]
    require_dtype("timesteps", timesteps, TIMES)
    require_shape("timesteps", timesteps, batch_size=batch_size)
    require_same_device("timesteps", timesteps, "latents", latents)
    text = {"batch_size": batch_size, "text_length": None, "cross_attention_dim": config.cross_attention_dim}
    require_like("encoder_hidden_states", encoder_hidden_states, "latents", latents, **text)
    if encoder_attention_mask is not None:
        name, text_length = "encoder_attention_mask", encoder_hidden_states.shape[1]
        require_dtype(name, encoder_attention_mask, ("bool",))
        require_shape(name, encoder_attention_mask, batch_size=batch_size, text_length=text_length)
        require_same_device(name, encoder_attention_mask, "latents", latents)
    state_entries(state, shapes, like=latents)
