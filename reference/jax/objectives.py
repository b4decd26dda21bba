"""Objectives: what a diffusion model is trained to predict, and how far off it is.

In rectified flow, data lie at time 0, noise at time 1, and a straight line leads from one to the other.

Shapes: B batch_size.
"""

import math

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import FlowWeighting, PredictionType, SnrOfTimes, VelocitySign
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.predictions import min_snr_weights

TIMESTEPS = 1000  # what a model is told at time 1; 0 at time 0
SMALLEST_SHARE = 1e-8  # of the data, in the trainer whose weights are "noise over data"


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


def rectified_flow_min_snr_weights(
    times: jax.Array, *, prediction_type: PredictionType, gamma: float, snr: SnrOfTimes = "data over noise"
) -> jax.Array:
    """As `gaugeblock.reference.torch.objectives.rectified_flow_min_snr_weights`."""
    validation.rectified_flow_min_snr_weights(times, prediction_type, gamma, snr)
    if snr == "data over noise":
        return min_snr_weights(jnp.square((1 - times) / times), prediction_type=prediction_type, gamma=gamma)
    ratios_B = jnp.square(times / jnp.maximum(1 - times, SMALLEST_SHARE))
    return jnp.minimum(gamma / ratios_B, 1)


def rectified_flow_weights(times: jax.Array, *, weighting: FlowWeighting) -> jax.Array:
    """As `gaugeblock.reference.torch.objectives.rectified_flow_weights`."""
    validation.rectified_flow_weights(times, weighting)
    match weighting:
        case "none":
            return jnp.ones_like(times)
        case "sigma_sqrt":
            return 1 / jnp.square(times)
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * times + 2 * jnp.square(times)))
