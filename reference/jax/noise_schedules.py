"""Noise schedules: how much noise there is at each timestep, and which timesteps or sigmas a sampler visits.

Tables are computed in float64 by `gaugeblock.reference.noise_tables`, which has their formulas.

Shapes: B batch_size.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import noise_tables, validation
from gaugeblock.reference.configs import DiffusionScheduleConfig, EDMScheduleConfig, FlowScheduleConfig
from gaugeblock.reference.jax.precision import at_least_float32


def betas(config: DiffusionScheduleConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.noise_schedules.betas`, but float32 where JAX has no float64."""
    validation.diffusion_schedule(config)
    return jnp.asarray(noise_tables.betas(config))


def alphas_cumprod(config: DiffusionScheduleConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.noise_schedules.alphas_cumprod`, but float32 where JAX has no float64."""
    validation.diffusion_schedule(config)
    return jnp.asarray(noise_tables.cumulative_alphas(noise_tables.betas(config)))


def timesteps(config: DiffusionScheduleConfig, num_steps: int) -> jax.Array:
    """As `gaugeblock.reference.torch.noise_schedules.timesteps`, but int32 where JAX has no int64."""
    validation.diffusion_schedule(config, num_steps)
    return jnp.asarray(noise_tables.timesteps(config, num_steps))


def previous_timesteps(config: DiffusionScheduleConfig, num_steps: int, *, constant_stride: bool) -> jax.Array:
    """As `gaugeblock.reference.torch.noise_schedules.previous_timesteps`, but int32 where JAX has no int64."""
    validation.diffusion_schedule(config, num_steps)
    return jnp.asarray(noise_tables.previous_timesteps(config, num_steps, constant_stride=constant_stride))


def sigmas(config: DiffusionScheduleConfig, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.noise_schedules.sigmas`, but float32 where JAX has no float64."""
    validation.diffusion_schedule(config, num_steps)
    visited, told = noise_tables.sigmas(config, num_steps)
    return jnp.asarray(visited), jnp.asarray(told)


def flow_training_sigmas(config: FlowScheduleConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.noise_schedules.flow_training_sigmas`, but float32 where JAX has no float64."""
    validation.schedule_config(config, FlowScheduleConfig)
    return jnp.asarray(noise_tables.flow_table(config))


def flow_sigmas(config: FlowScheduleConfig, num_steps: int, *, mu: float | None = None) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.noise_schedules.flow_sigmas`, but float32 where JAX has no float64."""
    validation.flow_schedule(config, num_steps, mu)
    visited, told = noise_tables.flow_sigmas(config, num_steps, mu)
    return jnp.asarray(visited), jnp.asarray(told)


def dynamic_mu(config: FlowScheduleConfig, num_image_tokens: int) -> float:
    """As `gaugeblock.reference.torch.noise_schedules.dynamic_mu`."""
    validation.dynamic_mu(config, num_image_tokens)
    return noise_tables.dynamic_mu(config, num_image_tokens)


def edm_sigmas(config: EDMScheduleConfig, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.noise_schedules.edm_sigmas`, but float32 where JAX has no float64."""
    validation.edm_schedule(config, num_steps)
    visited, told = noise_tables.edm_sigmas(config, num_steps)
    return jnp.asarray(visited), jnp.asarray(told)


def signal_and_noise(alphas_cumprod: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.noise_schedules.signal_and_noise`."""
    validation.cumulative_alphas(alphas_cumprod)
    return jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)


def signal_to_noise(alphas_cumprod: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.noise_schedules.signal_to_noise`."""
    validation.cumulative_alphas(alphas_cumprod)
    return alphas_cumprod / (1 - alphas_cumprod)


def shift_sigmas(sigmas: jax.Array, *, shift: float) -> jax.Array:
    """As `gaugeblock.reference.torch.noise_schedules.shift_sigmas`."""
    validation.shift_sigmas(sigmas, shift)
    sigmas_B = at_least_float32(sigmas)
    return (shift * sigmas_B / (1 + (shift - 1) * sigmas_B)).astype(sigmas.dtype)
