"""Calls of the layers of diffusion transformers."""

import math
from typing import Any

from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_between,
    require_dtype,
    require_like,
    require_positive,
    require_shape,
)


def layer_norm_modulate(hidden_states: Any, shift: Any, scale: Any, eps: Any) -> None:
    """Check the arguments of `layers.layer_norm_modulate`."""
    require_tokens("hidden_states", hidden_states)
    batch_size, _, hidden_size = hidden_states.shape
    for name, array in (("shift", shift), ("scale", scale)):
        require_like(name, array, "hidden_states", hidden_states, batch_size=batch_size, hidden_size=hidden_size)
    require_positive("eps", eps)


def gated_residual(residual: Any, branch: Any, gate: Any) -> None:
    """Check the arguments of `layers.gated_residual`."""
    require_tokens("residual", residual)
    batch_size, num_tokens, hidden_size = residual.shape
    require_like("branch", branch, "residual", residual, batch_size=batch_size, num_tokens=num_tokens, hidden_size=hidden_size)
    require_like("gate", gate, "residual", residual, batch_size=batch_size, hidden_size=hidden_size)


def gated_residual_layer_norm_modulate(residual: Any, branch: Any, gate: Any, shift: Any, scale: Any, eps: Any) -> None:
    """Check the arguments of `layers.gated_residual_layer_norm_modulate`."""
    gated_residual(residual, branch, gate)
    layer_norm_modulate(residual, shift, scale, eps)


def self_attention(hidden_states: Any, qkv_weight: Any, qkv_bias: Any, proj_weight: Any, proj_bias: Any, num_heads: Any) -> None:
    """Check the arguments of `layers.self_attention`."""
    require_tokens("hidden_states", hidden_states)
    hidden_size = hidden_states.shape[2]
    require_between("num_heads", num_heads, 1, hidden_size, "hidden_size=")
    if hidden_size % num_heads:
        raise ValueError(f"num_heads must divide hidden_size={hidden_size}, got {num_heads}")
    thrice = {"three_hidden_sizes": 3 * hidden_size}
    require_like("qkv_weight", qkv_weight, "hidden_states", hidden_states, **thrice, hidden_size=hidden_size)
    require_like("qkv_bias", qkv_bias, "hidden_states", hidden_states, **thrice)
    require_like("proj_weight", proj_weight, "hidden_states", hidden_states, hidden_size=hidden_size, in_features=hidden_size)
    require_like("proj_bias", proj_bias, "hidden_states", hidden_states, hidden_size=hidden_size)


def gelu_mlp(hidden_states: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, fc2_bias: Any) -> None:
    """Check the arguments of `layers.gelu_mlp`."""
    require_tokens("hidden_states", hidden_states)
    hidden_size = hidden_states.shape[2]
    require_like("fc1_weight", fc1_weight, "hidden_states", hidden_states, intermediate_size=None, hidden_size=hidden_size)
    inner = {"intermediate_size": fc1_weight.shape[0]}
    require_like("fc1_bias", fc1_bias, "hidden_states", hidden_states, **inner)
    require_like("fc2_weight", fc2_weight, "hidden_states", hidden_states, hidden_size=hidden_size, **inner)
    require_like("fc2_bias", fc2_bias, "hidden_states", hidden_states, hidden_size=hidden_size)


def timestep_embedding(timesteps: Any, embedding_size: Any, frequency_shift: Any) -> None:
    """Check the arguments of `layers.timestep_embedding`."""
    require_dtype("timesteps", timesteps, ("float32", "float64"))
    require_shape("timesteps", timesteps, batch_size=None)
    require_between("embedding_size", embedding_size, 4, 2**31)
    if embedding_size % 2:
        raise ValueError(f"embedding_size must be even, got {embedding_size}")
    require_between("frequency_shift", frequency_shift, 0, 1)


def sincos_position_embedding(grid_size: Any, like: Any) -> None:
    """Check the arguments of `layers.sincos_position_embedding`."""
    require_between("grid_size", grid_size, 1, 2**15)
    require_dtype("like", like, FLOATING)
    if len(like.shape) == 0 or like.shape[-1] % 4:
        raise ValueError(f"like must be [..., hidden_size], a multiple of 4, got {tuple(like.shape)}")


def patchify(images: Any, patch_size: Any) -> None:
    """Check the arguments of `layers.patchify`."""
    require_dtype("images", images, FLOATING)
    require_shape("images", images, batch_size=None, channels=None, height=None, width=None)
    require_between("patch_size", patch_size, 1, min(images.shape[2:]), "size of the images=")
    if images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(f"images must have sizes that patch_size={patch_size} divides, got {tuple(images.shape)}")


def unpatchify(patches: Any, patch_size: Any, num_rows: Any) -> None:
    """Check the arguments of `layers.unpatchify`."""
    require_dtype("patches", patches, FLOATING)
    require_shape("patches", patches, batch_size=None, num_patches=None, values_of_a_patch=None)
    require_between("patch_size", patch_size, 1, 2**15)
    if num_rows is not None:
        require_between("num_rows", num_rows, 1, 2**31)
        if patches.shape[1] % num_rows:
            raise ValueError(f"patches must be a multiple of num_rows={num_rows} patches, got {tuple(patches.shape)}")
    elif math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
        raise ValueError(f"patches must be a square number of patches, got {tuple(patches.shape)}")
    if patches.shape[2] % patch_size**2:
        raise ValueError(f"patches must have patch_size**2={patch_size**2} pixels each, got {tuple(patches.shape)}")


def require_tokens(name: str, array: Any, hidden_size: int | None = None) -> None:
    require_dtype(name, array, FLOATING)
    require_shape(name, array, batch_size=None, num_tokens=None, hidden_size=hidden_size)
