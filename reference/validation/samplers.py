"""Calls of samplers."""

from typing import Any

from gaugeblock.reference.validation.arrays import INTEGER, require_between, require_dtype, require_number, require_shape
from gaugeblock.reference.validation.objectives import velocity_sign


def euler_sample(noise: Any, labels: Any, num_steps: Any, velocity: Any) -> None:
    """Check the arguments of `samplers.euler_sample`."""
    starting_noise(noise)
    require_dtype("labels", labels, INTEGER)
    require_shape("labels", labels, batch_size=noise.shape[0])
    require_between("num_steps", num_steps, 1, 2**31 - 1)
    velocity_sign(velocity)


def starting_noise(noise: Any) -> None:
    """Check the noise that a sampler starts from."""
    require_dtype("noise", noise, ("float32", "float64"))
    if len(noise.shape) < 2:
        raise ValueError(f"noise must be [batch_size, ...], got {tuple(noise.shape)}")


def sample(noise: Any, example_ids: Any) -> None:
    """Check the arrays that a sampler with draws gets."""
    starting_noise(noise)
    require_dtype("example_ids", example_ids, (*INTEGER, "uint32"))
    require_shape("example_ids", example_ids, batch_size=noise.shape[0])


def churned_sample(noise: Any, example_ids: Any, churn: Any) -> None:
    """Check what a sampler with new noise on the way gets."""
    sample(noise, example_ids)
    require_number("churn", churn)
    if churn < 0:
        raise ValueError(f"churn must not be negative, got {churn}")
