"""One step of each sampler: from a noised example and what a model predicts of it to one with less noise.

Rates and sigmas are given per example, so that examples of one batch may be at different steps. What is random is an argument.

Shapes: B batch_size.
"""

import math

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiffusionScheduleConfig, EDMScheduleConfig, PredictionType
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.predictions import convert_prediction, per_example

SMALLEST_VARIANCE = 1e-20  # whose logarithm is taken: the posterior of the last step has none


def ddpm_step(
    noised: jax.Array,
    prediction: jax.Array,
    noise: jax.Array,
    alphas_cumprod: jax.Array,
    previous_alphas_cumprod: jax.Array,
    *,
    config: DiffusionScheduleConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.ddpm_step`."""
    validation.ddpm_step(noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod, config)
    x, z = at_least_float32(noised), at_least_float32(noise)
    a_B1, previous_B1 = per_example(alphas_cumprod, x), per_example(previous_alphas_cumprod, x)
    output = at_least_float32(prediction)[:, : x.shape[1]]
    data = predicted_data(x, output, alphas_cumprod, config=config)

    beta_B1 = (previous_B1 - a_B1) / previous_B1
    of_data_B1 = jnp.sqrt(previous_B1) * beta_B1 / (1 - a_B1)
    of_noised_B1 = jnp.sqrt(a_B1 / previous_B1) * (1 - previous_B1) / (1 - a_B1)
    posterior_B1 = (1 - previous_B1) / (1 - a_B1) * beta_B1
    match config.variance_type:
        case "fixed_small":
            deviation = jnp.sqrt(posterior_B1)
        case "fixed_large":
            deviation = jnp.sqrt(beta_B1)
        case "learned_range":
            share = (at_least_float32(prediction)[:, x.shape[1] :] + 1) / 2
            deviation = jnp.exp(
                (share * jnp.log(beta_B1) + (1 - share) * jnp.log(jnp.maximum(posterior_B1, SMALLEST_VARIANCE))) / 2
            )
    return (of_data_B1 * data + of_noised_B1 * x + deviation * z).astype(noised.dtype)


def ddim_step(
    noised: jax.Array,
    prediction: jax.Array,
    noise: jax.Array,
    alphas_cumprod: jax.Array,
    previous_alphas_cumprod: jax.Array,
    *,
    config: DiffusionScheduleConfig,
    eta: float,
    use_clipped_model_output: bool = False,
) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.ddim_step`."""
    validation.ddim_step(
        noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod, config, eta, use_clipped_model_output
    )
    x, output, z = at_least_float32(noised), at_least_float32(prediction), at_least_float32(noise)
    a_B1, previous_B1 = per_example(alphas_cumprod, x), per_example(previous_alphas_cumprod, x)
    data = predicted_data(x, output, alphas_cumprod, config=config)
    if use_clipped_model_output:
        epsilon = (x - jnp.sqrt(a_B1) * data) / jnp.sqrt(1 - a_B1)
    else:
        rates = jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)
        epsilon = convert_prediction(output, x, *rates, prediction_type=config.prediction_type, to="epsilon")

    new_B1 = eta**2 * (previous_B1 - a_B1) / previous_B1 / (1 - a_B1)  # how much of the noise's variance
    # 1 - new without its cancellation, which can leave less than nothing where a is small
    old_B1 = (1 - eta**2) + eta**2 * a_B1 * (1 - previous_B1) / (previous_B1 * (1 - a_B1))
    direction = jnp.sqrt((1 - previous_B1) * old_B1) * epsilon
    return (jnp.sqrt(previous_B1) * data + direction + jnp.sqrt((1 - previous_B1) * new_B1) * z).astype(noised.dtype)


def predicted_data(
    noised: jax.Array, prediction: jax.Array, alphas_cumprod: jax.Array, *, config: DiffusionScheduleConfig
) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.predicted_data`."""
    rates = jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)
    data = convert_prediction(prediction, noised, *rates, prediction_type=config.prediction_type, to="sample")
    if config.thresholding:
        return dynamic_threshold(data, ratio=config.dynamic_thresholding_ratio, max_value=config.sample_max_value)
    return clipped(data, config)


def dynamic_threshold(data: jax.Array, *, ratio: float, max_value: float) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.dynamic_threshold`."""
    validation.dynamic_threshold(data, ratio, max_value)
    wide = at_least_float32(data)
    quantiles_B = jnp.quantile(jnp.abs(wide).reshape(len(data), math.prod(data.shape[1:])), ratio, axis=1)
    limits_B1 = per_example(jnp.clip(quantiles_B, 1, max_value), data)
    return (jnp.clip(wide, -limits_B1, limits_B1) / limits_B1).astype(data.dtype)


def euler_step(
    noised: jax.Array,
    prediction: jax.Array,
    noise: jax.Array,
    sigmas: jax.Array,
    next_sigmas: jax.Array,
    *,
    prediction_type: PredictionType,
    churn: float = 0.0,
    noise_scale: float = 1.0,
) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.euler_step`."""
    validation.euler_step(noised, prediction, noise, sigmas, next_sigmas, prediction_type, churn, noise_scale)
    sigmas_B1, next_B1 = per_example(sigmas, noised), per_example(next_sigmas, noised)
    x, higher_B1 = churned(noised, noise, sigmas_B1, churn, noise_scale)
    at_B1 = sigmas_B1 if prediction_type == "v_prediction" else higher_B1
    data = data_at_sigma(x, at_least_float32(prediction), at_B1, prediction_type)
    return (x + (x - data) / higher_B1 * (next_B1 - higher_B1)).astype(noised.dtype)


def heun_step(
    noised: jax.Array,
    prediction: jax.Array,
    euler_noised: jax.Array,
    euler_prediction: jax.Array,
    sigmas: jax.Array,
    next_sigmas: jax.Array,
    *,
    config: DiffusionScheduleConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.heun_step`."""
    validation.heun_step(noised, prediction, euler_noised, euler_prediction, sigmas, next_sigmas, config)
    sigmas_B1, next_B1 = per_example(sigmas, noised), per_example(next_sigmas, noised)
    x = at_least_float32(noised)  # once, so that its two gradients are added before they are rounded
    first = clipped_slope(x, prediction, sigmas_B1, config)
    second = clipped_slope(euler_noised, euler_prediction, next_B1, config)
    return (x + (first + second) / 2 * (next_B1 - sigmas_B1)).astype(noised.dtype)


def heun_predictor(
    noised: jax.Array,
    prediction: jax.Array,
    sigmas: jax.Array,
    next_sigmas: jax.Array,
    *,
    config: DiffusionScheduleConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.heun_predictor`."""
    validation.heun_predictor(noised, prediction, sigmas, next_sigmas, config)
    sigmas_B1, next_B1 = per_example(sigmas, noised), per_example(next_sigmas, noised)
    x = at_least_float32(noised)
    slope = clipped_slope(x, prediction, sigmas_B1, config)
    return (x + slope * (next_B1 - sigmas_B1)).astype(noised.dtype)


def edm_step(
    noised: jax.Array,
    prediction: jax.Array,
    noise: jax.Array,
    sigmas: jax.Array,
    next_sigmas: jax.Array,
    *,
    config: EDMScheduleConfig,
    churn: float = 0.0,
    noise_scale: float = 1.0,
) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.edm_step`."""
    validation.edm_step(noised, prediction, noise, sigmas, next_sigmas, config, churn, noise_scale)
    x, higher_B1 = churned(noised, noise, per_example(sigmas, noised), churn, noise_scale)
    of_both_B1 = jnp.square(higher_B1) + config.sigma_data**2
    scaled = higher_B1 * config.sigma_data / jnp.sqrt(of_both_B1) * at_least_float32(prediction)
    data = config.sigma_data**2 / of_both_B1 * x + (scaled if config.prediction_type == "epsilon" else -scaled)
    return (x + (x - data) / higher_B1 * (per_example(next_sigmas, noised) - higher_B1)).astype(noised.dtype)


def flow_step(
    noised: jax.Array,
    prediction: jax.Array,
    noise: jax.Array,
    sigmas: jax.Array,
    next_sigmas: jax.Array,
    *,
    stochastic_sampling: bool,
) -> jax.Array:
    """As `gaugeblock.reference.torch.sampler_steps.flow_step`."""
    validation.flow_step(noised, prediction, noise, sigmas, next_sigmas, stochastic_sampling)
    x, velocity = at_least_float32(noised), at_least_float32(prediction)
    sigmas_B1, next_B1 = per_example(sigmas, x), per_example(next_sigmas, x)
    if stochastic_sampling:
        return ((1 - next_B1) * (x - sigmas_B1 * velocity) + next_B1 * at_least_float32(noise)).astype(noised.dtype)
    return (x + (next_B1 - sigmas_B1) * velocity).astype(noised.dtype)


def churned(
    noised: jax.Array, noise: jax.Array, sigmas_B1: jax.Array, churn: float, noise_scale: float
) -> tuple[jax.Array, jax.Array]:
    """Return the examples with new noise, and their sigmas; both in at least float32."""
    # higher**2 - sigma**2, without its cancellation
    added_B1 = noise_scale * sigmas_B1 * (churn * (2 + churn)) ** 0.5
    return at_least_float32(noised) + added_B1 * at_least_float32(noise), sigmas_B1 * (1 + churn)


def data_at_sigma(x: jax.Array, output: jax.Array, sigmas_B1: jax.Array, prediction_type: PredictionType) -> jax.Array:
    """Return the data that a variance preserving model's output means, where x is data + sigma * noise."""
    match prediction_type:
        case "epsilon":
            return x - sigmas_B1 * output
        case "v_prediction":
            return (x - sigmas_B1 * jnp.sqrt(jnp.square(sigmas_B1) + 1) * output) / (jnp.square(sigmas_B1) + 1)
        case _:
            return output


def clipped_slope(noised: jax.Array, prediction: jax.Array, sigmas_B1: jax.Array, config: DiffusionScheduleConfig) -> jax.Array:
    """Return by how much a noised example changes with sigma; in at least float32."""
    x = at_least_float32(noised)
    data = data_at_sigma(x, at_least_float32(prediction), sigmas_B1, config.prediction_type)
    return (x - clipped(data, config)) / sigmas_B1


def clipped(data: jax.Array, config: DiffusionScheduleConfig) -> jax.Array:
    """Return the data, clipped if the config says so."""
    return jnp.clip(data, -config.clip_sample_range, config.clip_sample_range) if config.clip_sample else data
