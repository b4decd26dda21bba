"""Calls of norms with parameters."""

from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_between,
    require_dtype,
    require_like,
    require_positive,
    require_shape,
)


def rms_norm(hidden_states: Any, weight: Any, eps: Any) -> None:
    """Check the arguments of `norms.rms_norm`."""
    require_dtype("hidden_states", hidden_states, FLOATING)
    if len(hidden_states.shape) == 0:
        raise ValueError("hidden_states must be [..., hidden_size], got ()")
    require_like("weight", weight, "hidden_states", hidden_states, hidden_size=hidden_states.shape[-1])
    require_positive("eps", eps)


def layer_norm_affine(hidden_states: Any, weight: Any, bias: Any, eps: Any) -> None:
    """Check the arguments of `norms.layer_norm_affine`."""
    rms_norm(hidden_states, weight, eps)
    require_like("bias", bias, "hidden_states", hidden_states, hidden_size=hidden_states.shape[-1])


def group_norm(images: Any, weight: Any, bias: Any, num_groups: Any, eps: Any) -> None:
    """Check the arguments of `norms.group_norm` and `norms.group_norm_silu`."""
    require_dtype("images", images, FLOATING)
    require_shape("images", images, batch_size=None, channels=None, height=None, width=None)
    channels = images.shape[1]
    for name, array in (("weight", weight), ("bias", bias)):
        require_like(name, array, "images", images, channels=channels)
    require_between("num_groups", num_groups, 1, channels, "channels=")
    if channels % num_groups:
        raise ValueError(f"num_groups must divide channels={channels}, got {num_groups}")
    require_positive("eps", eps)
