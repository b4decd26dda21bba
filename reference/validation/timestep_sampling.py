"""Calls of the sampling of timesteps."""

import math
from typing import Any

from gaugeblock.reference.configs import TimestepBias
from gaugeblock.reference.validation.arrays import (
    require_between,
    require_dtype,
    require_interval,
    require_number,
    require_one_of,
    require_positive,
    require_shape,
)

LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # beyond it, and below -1, times do not fall as u rises


def logit_normal_times(normals: Any, mean: Any, std: Any) -> None:
    """Check the arguments of `timestep_sampling.logit_normal_times`."""
    _numbers("normals", normals)
    require_number("mean", mean)
    require_positive("std", std)


def mode_times(uniforms: Any, scale: Any) -> None:
    """Check the arguments of `timestep_sampling.mode_times`."""
    _shares("uniforms", uniforms)
    require_number("scale", scale)
    if not -1 <= scale <= LARGEST_MODE_SCALE:
        raise ValueError(f"scale must be in [-1, 2 / (pi - 2)], got {scale}")


def timestep_indices(times: Any, num_timesteps: Any) -> None:
    """Check the arguments of `timestep_sampling.timestep_indices`."""
    _shares("times", times)
    require_between("num_timesteps", num_timesteps, 1, 2**31 - 1)


def biased_timesteps(uniforms: Any, num_timesteps: Any, bias: Any, multiplier: Any, portion: Any, begin: Any, end: Any) -> None:
    """Check the arguments of `timestep_sampling.biased_timesteps`."""
    _shares("uniforms", uniforms)
    require_between("num_timesteps", num_timesteps, 1, 2**31 - 1)
    require_one_of("bias", bias, TimestepBias)
    require_positive("multiplier", multiplier)
    require_number("portion", portion)
    if not 0 <= portion <= 1:
        raise ValueError(f"portion must be in [0, 1], got {portion}")
    if bias == "range":
        require_between("end", end, 1, num_timesteps, "num_timesteps=")
        require_between("begin", begin, 0, end - 1, "end - 1=")


def _numbers(name: str, array: Any) -> None:
    require_dtype(name, array, ("float32", "float64"))
    require_shape(name, array, batch_size=None)


def _shares(name: str, array: Any) -> None:
    _numbers(name, array)
    require_interval(name, array, 0, 1)
