"""Calls of Flux."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_between,
    require_dtype,
    require_like,
    require_same_device,
    require_shape,
    state_entries,
)

WIDE = ("float32", "float64")  # of lower precision, time 0.999 is 1 and place 257 is 256


def flux(
    state: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    pooled_projections: Any,
    timesteps: Any,
    guidance: Any,
    img_ids: Any,
    txt_ids: Any,
    config: FluxConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the arguments of `flux.flux`, whose parameters have these shapes."""
    require_dtype("hidden_states", hidden_states, FLOATING)
    require_shape("hidden_states", hidden_states, batch_size=None, num_image_tokens=None, in_channels=config.in_channels)
    batch_size, num_image_tokens, _ = hidden_states.shape
    text = {"batch_size": batch_size, "num_text_tokens": None, "joint_attention_dim": config.joint_attention_dim}
    require_like("encoder_hidden_states", encoder_hidden_states, "hidden_states", hidden_states, **text)
    pooled = {"batch_size": batch_size, "pooled_projection_dim": config.pooled_projection_dim}
    require_like("pooled_projections", pooled_projections, "hidden_states", hidden_states, **pooled)
    for name, array in (("timesteps", timesteps), ("guidance", guidance)):
        require_dtype(name, array, WIDE)
        require_shape(name, array, batch_size=batch_size)
        require_same_device(name, array, "hidden_states", hidden_states)
    for name, array, num_tokens in (
        ("img_ids", img_ids, num_image_tokens),
        ("txt_ids", txt_ids, encoder_hidden_states.shape[1]),
    ):
        require_dtype(name, array, WIDE)
        require_shape(name, array, num_tokens=num_tokens, axes=len(config.axes_dims_rope))
        require_same_device(name, array, "hidden_states", hidden_states)
    state_entries(state, shapes, like=hidden_states)


def pack_latents(latents: Any) -> None:
    """Check the arguments of `flux.pack_latents`."""
    require_dtype("latents", latents, FLOATING)
    require_shape("latents", latents, batch_size=None, channels=None, height=None, width=None)
    if latents.shape[2] % 2 or latents.shape[3] % 2:
        raise ValueError(f"latents must have an even height and width, got {tuple(latents.shape)}")


def unpack_latents(tokens: Any, height: Any, width: Any) -> None:
    """Check the arguments of `flux.unpack_latents`."""
    for name, size in (("height", height), ("width", width)):
        require_between(name, size, 2, 2**31)
        if size % 2:
            raise ValueError(f"{name} must be even, got {size}")
    require_dtype("tokens", tokens, FLOATING)
    require_shape("tokens", tokens, batch_size=None, num_tokens=height // 2 * (width // 2), channels=None)
    if tokens.shape[2] % 4:
        raise ValueError(f"tokens must have 4 features for each channel, got {tuple(tokens.shape)}")
