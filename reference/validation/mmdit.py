"""Calls of MMDiT."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_between,
    require_dtype,
    require_like,
    require_same_device,
    require_shape,
    state_entries,
)
from gaugeblock.reference.validation.layers import require_tokens


def mmdit(
    state: Any,
    latents: Any,
    encoder_hidden_states: Any,
    pooled_projections: Any,
    timesteps: Any,
    config: MMDiTConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the arguments of `mmdit.mmdit`, whose parameters have these shapes."""
    require_dtype("latents", latents, FLOATING)
    require_shape("latents", latents, batch_size=None, in_channels=config.in_channels, height=None, width=None)
    for size in latents.shape[2:]:
        if size % config.patch_size or not 0 < size <= config.pos_embed_max_size * config.patch_size:
            raise ValueError(
                f"latents must be as high and as wide as 1 to {config.pos_embed_max_size} patches of {config.patch_size}, "
                f"got {tuple(latents.shape)}"
            )
    batch_size = latents.shape[0]
    text = {"num_text_tokens": None, "joint_attention_dim": config.joint_attention_dim}
    pooled = {"pooled_projection_dim": config.pooled_projection_dim}
    require_like("encoder_hidden_states", encoder_hidden_states, "latents", latents, batch_size=batch_size, **text)
    require_like("pooled_projections", pooled_projections, "latents", latents, batch_size=batch_size, **pooled)
    require_dtype("timesteps", timesteps, ("float32", "float64"))
    require_shape("timesteps", timesteps, batch_size=batch_size)
    require_same_device("timesteps", timesteps, "latents", latents)
    state_entries(state, shapes, like=latents)


def mmdit_block(
    state: Any,
    hidden_states: Any,
    encoder_hidden_states: Any,
    conditioning: Any,
    config: MMDiTConfig,
    index: Any,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the arguments of `mmdit.block`, whose parameters have the given shapes."""
    require_between("index", index, 0, config.num_layers - 1)
    require_tokens("hidden_states", hidden_states, hidden_size=config.hidden_size)
    sizes = {"batch_size": hidden_states.shape[0], "num_text_tokens": None, "hidden_size": config.hidden_size}
    require_like("encoder_hidden_states", encoder_hidden_states, "hidden_states", hidden_states, **sizes)
    del sizes["num_text_tokens"]
    require_like("conditioning", conditioning, "hidden_states", hidden_states, **sizes)
    state_entries(state, shapes, like=hidden_states)
