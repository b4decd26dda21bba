"""Samplers: from noise to data, by what a model predicts on the way.

A model is a function of (x, timesteps [batch_size]) that predicts something like x; `guided` makes one of a model with labels.
The steps are in `sampler_steps`, what they visit is that of `noise_schedules`.

Shapes: B batch_size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gaugeblock.reference import noise_tables, purposes, validation
from gaugeblock.reference.configs import (
    LARGEST_CHURN,
    DiffusionScheduleConfig,
    EDMScheduleConfig,
    FlowScheduleConfig,
    VelocitySign,
)
from gaugeblock.reference.jax import random, sampler_steps
from gaugeblock.reference.jax.objectives import TIMESTEPS

Model = Callable[[jax.Array, jax.Array], jax.Array]


def starting_noise(example_ids: jax.Array, *, shape: tuple[int, ...], seed: int) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.starting_noise`."""
    return random.normal(shape, seed=seed, step=0, example=example_ids, purpose=purposes.SAMPLING_NOISE)


def euler_sample(
    model: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    labels: jax.Array,
    *,
    null_label: int,
    guidance_scale: float,
    num_steps: int,
    velocity: VelocitySign,
) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.euler_sample`."""
    validation.euler_sample(noise, labels, num_steps, velocity)

    guided_model, x = guided(model, labels, null_label=null_label, guidance_scale=guidance_scale), noise
    time_per_step = (-1 if velocity == "noise - data" else 1) / num_steps
    for n in range(num_steps):
        timesteps_B = jnp.full(labels.shape, TIMESTEPS * (1 - n / num_steps), x.dtype)
        x = x + time_per_step * guided_model(x, timesteps_B)
    return x


def guided(
    model: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    labels: jax.Array,
    *,
    null_label: int,
    guidance_scale: float,
) -> Model:
    """As `gaugeblock.reference.torch.samplers.guided`."""

    def predict(x: jax.Array, timesteps: jax.Array) -> jax.Array:
        unguided = model(x, timesteps, jnp.full_like(labels, null_label))
        return unguided + guidance_scale * (model(x, timesteps, labels) - unguided)

    return predict


def ddpm_sample(
    model: Model, noise: jax.Array, example_ids: jax.Array, *, config: DiffusionScheduleConfig, num_steps: int, seed: int
) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.ddpm_sample`."""
    validation.sample(noise, example_ids)
    validation.diffusion_schedule(config, num_steps)
    visited = noise_tables.timesteps(config, num_steps)
    following = noise_tables.previous_timesteps(config, num_steps, constant_stride=False)
    table = noise_tables.cumulative_alphas(noise_tables.betas(config))
    x = noise
    for n, (timestep, previous) in enumerate(zip(visited, following, strict=True)):
        z = jnp.zeros_like(x) if previous < 0 else step_noise(x, example_ids, step=n, seed=seed)
        rates = for_each(x, table[timestep]), for_each(x, table[previous] if previous >= 0 else 1.0)
        x = sampler_steps.ddpm_step(x, model(x, for_each(x, timestep)), z, *rates, config=config)
    return x


def ddim_sample(
    model: Model,
    noise: jax.Array,
    example_ids: jax.Array,
    *,
    config: DiffusionScheduleConfig,
    num_steps: int,
    seed: int,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    constant_stride: bool = True,
) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.ddim_sample`."""
    validation.sample(noise, example_ids)
    validation.diffusion_schedule(config, num_steps)
    visited = noise_tables.timesteps(config, num_steps)
    following = noise_tables.previous_timesteps(config, num_steps, constant_stride=constant_stride)
    table = noise_tables.cumulative_alphas(noise_tables.betas(config))
    last = 1.0 if config.set_alpha_to_one else table[0]
    x = noise
    for n, (timestep, previous) in enumerate(zip(visited, following, strict=True)):
        z = step_noise(x, example_ids, step=n, seed=seed) if eta > 0 else jnp.zeros_like(x)
        rates = for_each(x, table[timestep]), for_each(x, table[previous] if previous >= 0 else last)
        output = model(x, for_each(x, timestep))
        x = sampler_steps.ddim_step(
            x, output, z, *rates, config=config, eta=eta, use_clipped_model_output=use_clipped_model_output
        )
    return x


def sigma_euler_sample(
    model: Model,
    noise: jax.Array,
    example_ids: jax.Array,
    *,
    config: DiffusionScheduleConfig,
    num_steps: int,
    seed: int,
    churn: float = 0.0,
    churn_from: float = 0.0,
    churn_to: float = float("inf"),
    noise_scale: float = 1.0,
) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.sigma_euler_sample`."""
    validation.churned_sample(noise, example_ids, churn)
    validation.diffusion_schedule(config, num_steps)
    sigmas, timesteps = noise_tables.sigmas(config, num_steps)
    x = first_sigma(config, sigmas[0]) * noise
    for n, timestep in enumerate(timesteps):
        output = model(x / (sigmas[n] ** 2 + 1) ** 0.5, for_each(x, timestep))
        share = step_churn(sigmas[n], num_steps, churn, churn_from, churn_to)
        z = step_noise(x, example_ids, step=n, seed=seed) if share > 0 else jnp.zeros_like(x)
        at = for_each(x, sigmas[n]), for_each(x, sigmas[n + 1])
        x = sampler_steps.euler_step(
            x, output, z, *at, prediction_type=config.prediction_type, churn=share, noise_scale=noise_scale
        )
    return x


def heun_sample(model: Model, noise: jax.Array, *, config: DiffusionScheduleConfig, num_steps: int) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.heun_sample`."""
    validation.starting_noise(noise)
    validation.diffusion_schedule(config, num_steps)
    sigmas, timesteps = noise_tables.sigmas(config, num_steps)
    x = first_sigma(config, sigmas[0]) * noise
    for n, timestep in enumerate(timesteps):
        at = for_each(x, sigmas[n]), for_each(x, sigmas[n + 1])
        output = model(x / (sigmas[n] ** 2 + 1) ** 0.5, for_each(x, timestep))
        euler = sampler_steps.heun_predictor(x, output, *at, config=config)
        if n + 1 == num_steps:
            return euler
        euler_output = model(euler / (sigmas[n + 1] ** 2 + 1) ** 0.5, for_each(x, timesteps[n + 1]))
        x = sampler_steps.heun_step(x, output, euler, euler_output, *at, config=config)
    return x


def edm_sample(
    model: Model,
    noise: jax.Array,
    example_ids: jax.Array,
    *,
    config: EDMScheduleConfig,
    num_steps: int,
    seed: int,
    churn: float = 0.0,
    churn_from: float = 0.0,
    churn_to: float = float("inf"),
    noise_scale: float = 1.0,
) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.edm_sample`."""
    validation.churned_sample(noise, example_ids, churn)
    validation.edm_schedule(config, num_steps)
    sigmas, timesteps = noise_tables.edm_sigmas(config, num_steps)
    x = (config.sigma_max**2 + 1) ** 0.5 * noise
    for n, timestep in enumerate(timesteps):
        output = model(x / (sigmas[n] ** 2 + config.sigma_data**2) ** 0.5, for_each(x, timestep))
        share = step_churn(sigmas[n], num_steps, churn, churn_from, churn_to)
        z = step_noise(x, example_ids, step=n, seed=seed) if share > 0 else jnp.zeros_like(x)
        at = for_each(x, sigmas[n]), for_each(x, sigmas[n + 1])
        x = sampler_steps.edm_step(x, output, z, *at, config=config, churn=share, noise_scale=noise_scale)
    return x


def flow_sample(
    model: Model,
    noise: jax.Array,
    example_ids: jax.Array,
    *,
    config: FlowScheduleConfig,
    num_steps: int,
    seed: int,
    mu: float | None = None,
) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.flow_sample`."""
    validation.sample(noise, example_ids)
    validation.flow_schedule(config, num_steps, mu)
    sigmas, timesteps = noise_tables.flow_sigmas(config, num_steps, mu)
    x, stochastic = noise, config.stochastic_sampling
    for n, timestep in enumerate(timesteps):
        z = step_noise(x, example_ids, step=n, seed=seed) if stochastic else jnp.zeros_like(x)
        at = for_each(x, sigmas[n]), for_each(x, sigmas[n + 1])
        x = sampler_steps.flow_step(x, model(x, for_each(x, timestep)), z, *at, stochastic_sampling=stochastic)
    return x


def step_noise(x: jax.Array, example_ids: jax.Array, *, step: int, seed: int) -> jax.Array:
    """Draw the new noise of a step, like x, each example by its id."""
    drawn = random.normal(tuple(x.shape[1:]), seed=seed, step=step, example=example_ids, purpose=purposes.SAMPLER_STEP_NOISE)
    return drawn.astype(x.dtype)


def for_each(x: jax.Array, value: float) -> jax.Array:
    """Return a number for each example, [batch_size], dtype as x."""
    return jnp.full(len(x), value, x.dtype)


def first_sigma(config: DiffusionScheduleConfig, sigma: float) -> float:
    """Return what starting noise is multiplied by: of "leading" timesteps, which do not begin at the end, the data count too."""
    return sigma if config.timestep_spacing != "leading" else (sigma**2 + 1) ** 0.5


def step_churn(sigma: float, num_steps: int, churn: float, churn_from: float, churn_to: float) -> float:
    """Return how much a step's sigma grows by new noise."""
    return min(churn / num_steps, LARGEST_CHURN) if churn_from <= sigma <= churn_to else 0.0
