"""Predictions: what a diffusion model may be asked for, and how one kind becomes another.

With alpha as much of the data and sigma as much of the noise, a noised example is

    x = alpha * data + sigma * noise

and what is predicted is one of

    epsilon          noise
    sample           data
    v_prediction     alpha * noise - sigma * data
    flow_prediction  noise - data

Variance preserving diffusion has alpha**2 + sigma**2 = 1, rectified flow alpha + sigma = 1, EDM alpha = 1.

Shapes: B batch_size.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import PredictionType
from gaugeblock.reference.jax.precision import at_least_float32


def add_noise(data: jax.Array, noise: jax.Array, alphas: jax.Array, sigmas: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.predictions.add_noise`."""
    validation.add_noise(data, noise, alphas, sigmas)
    alphas_B1, sigmas_B1 = per_example(alphas, data), per_example(sigmas, data)
    return (alphas_B1 * at_least_float32(data) + sigmas_B1 * at_least_float32(noise)).astype(data.dtype)


def prediction_target(
    data: jax.Array, noise: jax.Array, alphas: jax.Array, sigmas: jax.Array, *, prediction_type: PredictionType
) -> jax.Array:
    """As `gaugeblock.reference.torch.predictions.prediction_target`."""
    validation.prediction_target(data, noise, alphas, sigmas, prediction_type)
    of_noise_B1, of_data_B1 = shares(per_example(alphas, data), per_example(sigmas, data), prediction_type)
    return (of_noise_B1 * at_least_float32(noise) + of_data_B1 * at_least_float32(data)).astype(data.dtype)


def convert_prediction(
    prediction: jax.Array,
    noised: jax.Array,
    alphas: jax.Array,
    sigmas: jax.Array,
    *,
    prediction_type: PredictionType,
    to: PredictionType,
) -> jax.Array:
    """As `gaugeblock.reference.torch.predictions.convert_prediction`."""
    validation.convert_prediction(prediction, noised, alphas, sigmas, prediction_type, to)
    if prediction_type == to:
        return prediction
    alphas_B1, sigmas_B1 = per_example(alphas, prediction), per_example(sigmas, prediction)
    noise_B1, data_B1 = shares(alphas_B1, sigmas_B1, prediction_type)
    to_noise_B1, to_data_B1 = shares(alphas_B1, sigmas_B1, to)
    determinant_B1 = alphas_B1 * noise_B1 - sigmas_B1 * data_B1
    of_prediction_B1 = (alphas_B1 * to_noise_B1 - sigmas_B1 * to_data_B1) / determinant_B1
    of_noised_B1 = (noise_B1 * to_data_B1 - to_noise_B1 * data_B1) / determinant_B1
    return (of_prediction_B1 * at_least_float32(prediction) + of_noised_B1 * at_least_float32(noised)).astype(prediction.dtype)


def min_snr_weights(snr: jax.Array, *, prediction_type: PredictionType, gamma: float) -> jax.Array:
    """As `gaugeblock.reference.torch.predictions.min_snr_weights`."""
    validation.min_snr_weights(snr, prediction_type, gamma)
    match prediction_type:
        case "sample":
            return jnp.minimum(snr, gamma)
        case "epsilon":
            return jnp.minimum(gamma / snr, 1)
        case "v_prediction":
            return jnp.minimum(snr, gamma) / (snr + 1)
        case "flow_prediction":
            return jnp.minimum(snr, gamma) / (1 + jnp.sqrt(snr)) ** 2


def shares(alphas: jax.Array, sigmas: jax.Array, prediction_type: PredictionType) -> tuple[jax.Array, jax.Array]:
    """Return how much of the noise and of the data a prediction of this kind is; like alphas."""
    zeros, ones = jnp.zeros_like(alphas), jnp.ones_like(alphas)
    match prediction_type:
        case "epsilon":
            return ones, zeros
        case "sample":
            return zeros, ones
        case "v_prediction":
            return alphas, -sigmas
        case "flow_prediction":
            return ones, -ones


def per_example(values: jax.Array, examples: jax.Array) -> jax.Array:
    """Return a number of each example, [batch_size], as [batch_size, 1, ...], with as many axes as the examples have."""
    return values.reshape(len(values), *[1] * (examples.ndim - 1))
