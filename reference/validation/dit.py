"""Calls of DiT."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    require_dtype,
    require_like,
    require_same_device,
    require_shape,
    require_values,
    state_entries,
)
from gaugeblock.reference.validation.layers import require_tokens


def dit(
    state: Any, latents: Any, timesteps: Any, class_labels: Any, config: DiTConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the arguments of `dit.dit`, whose parameters have these shapes; the labels stay unread (`class_labels_in_range`)."""
    require_dtype("latents", latents, FLOATING)
    sizes = {"in_channels": config.in_channels, "height": config.input_size, "width": config.input_size}
    require_shape("latents", latents, batch_size=None, **sizes)
    require_dtype("timesteps", timesteps, ("float32", "float64"))
    require_dtype("class_labels", class_labels, INTEGER)
    for name, array in (("timesteps", timesteps), ("class_labels", class_labels)):
        require_shape(name, array, batch_size=latents.shape[0])
        require_same_device(name, array, "latents", latents)
    state_entries(state, shapes, like=latents)


def dit_block(state: Any, hidden_states: Any, conditioning: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the arguments of `dit.block`, whose parameters have the given shapes."""
    require_tokens("hidden_states", hidden_states, hidden_size=shapes["attn.proj.bias"][0])
    batch_size, _, hidden_size = hidden_states.shape
    require_like("conditioning", conditioning, "hidden_states", hidden_states, batch_size=batch_size, hidden_size=hidden_size)
    state_entries(state, shapes, like=hidden_states)


def class_labels_in_range(class_labels: Any, num_classes: int) -> None:
    """Check that every label names a class or is `num_classes`, unless it cannot be read, like `expert_ids_in_range`."""
    require_values("class_labels", class_labels, num_classes)


def position_table(table: Any, num_patches: int, hidden_size: int) -> None:
    """Check a checkpoint's position table, but for its values."""
    require_dtype("state['pos_embed']", table, FLOATING)
    if tuple(table.shape) != (1, num_patches, hidden_size):
        raise ValueError(f"state must have a position table of shape {(1, num_patches, hidden_size)}, got {tuple(table.shape)}")
