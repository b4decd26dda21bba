"""Calls of samplers."""

from typing import Any

from gaugeblock.reference.validation.arrays import INTEGER, require_between, require_dtype, require_shape
from gaugeblock.reference.validation.objectives import velocity_sign


def euler_sample(noise: Any, labels: Any, num_steps: Any, velocity: Any) -> None:
    """Check the arguments of `samplers.euler_sample`."""
    require_dtype("noise", noise, ("float32", "float64"))
    if len(noise.shape) < 2:
        raise ValueError(f"noise must be [batch_size, ...], got {tuple(noise.shape)}")
    require_dtype("labels", labels, INTEGER)
    require_shape("labels", labels, batch_size=noise.shape[0])
    require_between("num_steps", num_steps, 1, 2**31 - 1)
    velocity_sign(velocity)
