"""Objectives: what a diffusion model is trained to predict, and how far off it is.

In rectified flow, data lie at time 0, noise at time 1, and a straight line leads from one to the other.

Shapes: B batch_size.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import VelocitySign
from gaugeblock.reference.jax.precision import at_least_float32

TIMESTEPS = 1000  # what a model is told at time 1; 0 at time 0


def rectified_flow_interpolate(data: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.objectives.rectified_flow_interpolate`."""
    validation.rectified_flow(data, noise)
    validation.rectified_flow_times(times, data)

    times_B1 = at_least_float32(times).reshape(-1, *[1] * (data.ndim - 1))
    return ((1 - times_B1) * at_least_float32(data) + times_B1 * at_least_float32(noise)).astype(data.dtype)


def rectified_flow_velocity(data: jax.Array, noise: jax.Array, *, velocity: VelocitySign) -> jax.Array:
    """As `gaugeblock.reference.torch.objectives.rectified_flow_velocity`."""
    validation.rectified_flow(data, noise)
    validation.velocity_sign(velocity)

    from_data_to_noise = at_least_float32(noise) - at_least_float32(data)
    return (from_data_to_noise if velocity == "noise - data" else -from_data_to_noise).astype(data.dtype)


def rectified_flow_loss(prediction: jax.Array, data: jax.Array, noise: jax.Array, *, velocity: VelocitySign) -> jax.Array:
    """As `gaugeblock.reference.torch.objectives.rectified_flow_loss`."""
    validation.rectified_flow(data, noise)
    validation.rectified_flow_prediction(prediction, data)
    target = rectified_flow_velocity(at_least_float32(data), at_least_float32(noise), velocity=velocity)
    errors = at_least_float32(prediction) - target
    return jnp.square(errors).mean(axis=tuple(range(1, errors.ndim)))
