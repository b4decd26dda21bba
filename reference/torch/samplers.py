"""Samplers: from noise to data, by what a model predicts on the way.

A model is a function of (x, timesteps [batch_size]) that predicts something like x; `guided` makes one of a model with labels.
The steps are in `sampler_steps`, what they visit is that of `noise_schedules`.

Shapes: B batch_size.
"""

from collections.abc import Callable

import torch

from gaugeblock.reference import noise_tables, purposes, validation
from gaugeblock.reference.configs import (
    LARGEST_CHURN,
    DiffusionScheduleConfig,
    EDMScheduleConfig,
    FlowScheduleConfig,
    VelocitySign,
)
from gaugeblock.reference.torch import random, sampler_steps
from gaugeblock.reference.torch.objectives import TIMESTEPS

Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def starting_noise(example_ids: torch.Tensor, *, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Draw the noise that the sampling of each example starts from.

    Args:
        example_ids: [batch_size], integer in 0..2**32 - 1; an id gets the same noise in any batch.
        shape: Of one example.
        seed: In 0..2**64 - 1.

    Returns:
        [batch_size, *shape], float32, standard normal.

    Raises: as `random.bits`.
    """
    return random.normal(shape, seed=seed, step=0, example=example_ids, purpose=purposes.SAMPLING_NOISE)


def euler_sample(
    model: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    labels: torch.Tensor,
    *,
    null_label: int,
    guidance_scale: float,
    num_steps: int,
    velocity: VelocitySign,
) -> torch.Tensor:
    """Follow the guided velocity from noise at time 1 to data at time 0, by Euler's method in equal steps.

        t = 1 - n / num_steps,  n = 0 .. num_steps - 1
        v = model(x, 1000 t, null_label);  v = v + guidance_scale * (model(x, 1000 t, label) - v)
        x = x - v / num_steps  where velocity is "noise - data"
        x = x + v / num_steps  where velocity is "data - noise"

    Args:
        model: Function of (x, timesteps [batch_size] in (0, 1000], labels) that predicts the velocity, like x; for instance
            `functools.partial(dit.dit, parameters, config=config)`.
        noise: [batch_size, ...], float32 or float64.
        labels: [batch_size], integer.
        null_label: The label that stands for none, with which the model was trained for some of the examples.
        guidance_scale: 0 ignores the labels, 1 is the model itself, more is further from no label.
        num_steps: At least 1.
        velocity: Which way the predicted velocity points.

    Returns:
        Like noise.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `num_steps` is not an integer.
        ValueError: Shapes do not fit together, `num_steps` is not positive, or `velocity` is neither of the two.

    Source: Liu et al. (arXiv:2209.03003), section 2.1; guidance: Ho and Salimans (arXiv:2207.12598), equation 6, with
    guidance_scale = w + 1.
    """
    validation.euler_sample(noise, labels, num_steps, velocity)

    guided_model, x = guided(model, labels, null_label=null_label, guidance_scale=guidance_scale), noise
    time_per_step = (-1 if velocity == "noise - data" else 1) / num_steps
    for n in range(num_steps):
        timesteps_B = x.new_full(labels.shape, TIMESTEPS * (1 - n / num_steps))
        x = x + time_per_step * guided_model(x, timesteps_B)
    return x


def guided(
    model: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    labels: torch.Tensor,
    *,
    null_label: int,
    guidance_scale: float,
) -> Model:
    """Return a model without labels: what is predicted with them, and how far that is from what is predicted without.

        p = model(x, timesteps, null_label);  p = p + guidance_scale * (model(x, timesteps, labels) - p)

    Args: as of `euler_sample`.

    Returns:
        Function of (x, timesteps [batch_size]).

    Source: Ho and Salimans (arXiv:2207.12598), equation 6, with guidance_scale = w + 1.
    """

    def predict(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        unguided = model(x, timesteps, torch.full_like(labels, null_label))
        return unguided + guidance_scale * (model(x, timesteps, labels) - unguided)

    return predict


def ddpm_sample(
    model: Model, noise: torch.Tensor, example_ids: torch.Tensor, *, config: DiffusionScheduleConfig, num_steps: int, seed: int
) -> torch.Tensor:
    """Draw data step by step, each from its distribution given the last.

    Args:
        model: Function of (x, timesteps [batch_size] in 0..num_train_timesteps - 1).
        noise: [batch_size, channels, ...], float32 or float64, standard normal.
        example_ids: [batch_size], integer in 0..2**32 - 1; an id gets the same draws in any batch.
        config: Of the schedule.
        num_steps: In 1..num_train_timesteps.
        seed: In 0..2**64 - 1.

    Returns:
        Like noise.

    Raises:
        TypeError: An argument is not an array of the dtype above, `config` none of its kind, or a number no integer.
        ValueError: Shapes do not fit together, or a value is out of its range.

    Source: Ho et al. (arXiv:2006.11239), algorithm 2.
    """
    validation.sample(noise, example_ids)
    validation.diffusion_schedule(config, num_steps)
    visited = noise_tables.timesteps(config, num_steps)
    following = noise_tables.previous_timesteps(config, num_steps, constant_stride=False)
    table = noise_tables.cumulative_alphas(noise_tables.betas(config))
    x = noise
    for n, (timestep, previous) in enumerate(zip(visited, following, strict=True)):
        z = torch.zeros_like(x) if previous < 0 else step_noise(x, example_ids, step=n, seed=seed)
        rates = for_each(x, table[timestep]), for_each(x, table[previous] if previous >= 0 else 1.0)
        x = sampler_steps.ddpm_step(x, model(x, for_each(x, timestep)), z, *rates, config=config)
    return x


def ddim_sample(
    model: Model,
    noise: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: DiffusionScheduleConfig,
    num_steps: int,
    seed: int,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    constant_stride: bool = True,
) -> torch.Tensor:
    """Take predicted noise away step by step, and put a part of it back.

    Args: as of `ddpm_sample`, and
        eta: How much of the noise is new: 0 none, 1 as much as DDPM's.
        use_clipped_model_output: Whether the noise is that of the clipped data.
        constant_stride: Whether a step leads num_train_timesteps // num_steps down, as in public samplers, or to the timestep
            that is visited next.

    Returns:
        Like noise.

    Raises: as `ddpm_sample`.

    Source: Song et al. (arXiv:2010.02502), equation 12.
    """
    validation.sample(noise, example_ids)
    validation.diffusion_schedule(config, num_steps)
    visited = noise_tables.timesteps(config, num_steps)
    following = noise_tables.previous_timesteps(config, num_steps, constant_stride=constant_stride)
    table = noise_tables.cumulative_alphas(noise_tables.betas(config))
    last = 1.0 if config.set_alpha_to_one else table[0]
    x = noise
    for n, (timestep, previous) in enumerate(zip(visited, following, strict=True)):
        z = step_noise(x, example_ids, step=n, seed=seed) if eta > 0 else torch.zeros_like(x)
        rates = for_each(x, table[timestep]), for_each(x, table[previous] if previous >= 0 else last)
        output = model(x, for_each(x, timestep))
        x = sampler_steps.ddim_step(
            x, output, z, *rates, config=config, eta=eta, use_clipped_model_output=use_clipped_model_output
        )
    return x


def sigma_euler_sample(
    model: Model,
    noise: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: DiffusionScheduleConfig,
    num_steps: int,
    seed: int,
    churn: float = 0.0,
    churn_from: float = 0.0,
    churn_to: float = float("inf"),
    noise_scale: float = 1.0,
) -> torch.Tensor:
    """Follow the slope of a variance preserving model from sigma to sigma, with new noise on the way.

    Args: as of `ddpm_sample`, and
        churn: Of the whole way: each step gets churn / num_steps of it, sqrt(2) - 1 at most.
        churn_from, churn_to: Sigmas outside of which there is none.
        noise_scale: Of the new noise.

    Returns:
        Like noise.

    Raises: as `ddpm_sample`.

    Source: as of `sampler_steps.euler_step`; k-diffusion, sampling.py, sample_euler.
    """
    validation.churned_sample(noise, example_ids, churn)
    validation.diffusion_schedule(config, num_steps)
    sigmas, timesteps = noise_tables.sigmas(config, num_steps)
    x = first_sigma(config, sigmas[0]) * noise
    for n, timestep in enumerate(timesteps):
        output = model(x / (sigmas[n] ** 2 + 1) ** 0.5, for_each(x, timestep))
        share = step_churn(sigmas[n], num_steps, churn, churn_from, churn_to)
        z = step_noise(x, example_ids, step=n, seed=seed) if share > 0 else torch.zeros_like(x)
        at = for_each(x, sigmas[n]), for_each(x, sigmas[n + 1])
        x = sampler_steps.euler_step(
            x, output, z, *at, prediction_type=config.prediction_type, churn=share, noise_scale=noise_scale
        )
    return x


def heun_sample(model: Model, noise: torch.Tensor, *, config: DiffusionScheduleConfig, num_steps: int) -> torch.Tensor:
    """Follow the mean of two slopes from sigma to sigma, by 2 num_steps - 1 calls of a variance preserving model.

    Args: as of `ddpm_sample`.

    Returns:
        Like noise.

    Raises: as `ddpm_sample`.

    Source: Karras et al. (arXiv:2206.00364), algorithm 1.
    """
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
    noise: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: EDMScheduleConfig,
    num_steps: int,
    seed: int,
    churn: float = 0.0,
    churn_from: float = 0.0,
    churn_to: float = float("inf"),
    noise_scale: float = 1.0,
) -> torch.Tensor:
    """Follow the slope of a model of EDM from sigma to sigma, with new noise on the way.

    Args: as of `sigma_euler_sample`, but the model is told log(sigma) / 4.

    Returns:
        Like noise.

    Raises: as `ddpm_sample`.

    Source: as of `sampler_steps.edm_step`.
    """
    validation.churned_sample(noise, example_ids, churn)
    validation.edm_schedule(config, num_steps)
    sigmas, timesteps = noise_tables.edm_sigmas(config, num_steps)
    x = (config.sigma_max**2 + 1) ** 0.5 * noise
    for n, timestep in enumerate(timesteps):
        output = model(x / (sigmas[n] ** 2 + config.sigma_data**2) ** 0.5, for_each(x, timestep))
        share = step_churn(sigmas[n], num_steps, churn, churn_from, churn_to)
        z = step_noise(x, example_ids, step=n, seed=seed) if share > 0 else torch.zeros_like(x)
        at = for_each(x, sigmas[n]), for_each(x, sigmas[n + 1])
        x = sampler_steps.edm_step(x, output, z, *at, config=config, churn=share, noise_scale=noise_scale)
    return x


def flow_sample(
    model: Model,
    noise: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: FlowScheduleConfig,
    num_steps: int,
    seed: int,
    mu: float | None = None,
) -> torch.Tensor:
    """Follow a flow's velocity, noise - data, from sigma to sigma.

    Args: as of `ddpm_sample`, but the model is told num_train_timesteps * sigma, and
        mu: Of dynamic shifting; `noise_schedules.dynamic_mu` says it for images.

    Returns:
        Like noise.

    Raises: as `ddpm_sample`.

    Source: as of `sampler_steps.flow_step`.
    """
    validation.sample(noise, example_ids)
    validation.flow_schedule(config, num_steps, mu)
    sigmas, timesteps = noise_tables.flow_sigmas(config, num_steps, mu)
    x, stochastic = noise, config.stochastic_sampling
    for n, timestep in enumerate(timesteps):
        z = step_noise(x, example_ids, step=n, seed=seed) if stochastic else torch.zeros_like(x)
        at = for_each(x, sigmas[n]), for_each(x, sigmas[n + 1])
        x = sampler_steps.flow_step(x, model(x, for_each(x, timestep)), z, *at, stochastic_sampling=stochastic)
    return x


def step_noise(x: torch.Tensor, example_ids: torch.Tensor, *, step: int, seed: int) -> torch.Tensor:
    """Draw the new noise of a step, like x, each example by its id."""
    drawn = random.normal(tuple(x.shape[1:]), seed=seed, step=step, example=example_ids, purpose=purposes.SAMPLER_STEP_NOISE)
    return drawn.to(x.dtype)


def for_each(x: torch.Tensor, value: float) -> torch.Tensor:
    """Return a number for each example, [batch_size], dtype as x."""
    return x.new_full((len(x),), value)


def first_sigma(config: DiffusionScheduleConfig, sigma: float) -> float:
    """Return what starting noise is multiplied by: of "leading" timesteps, which do not begin at the end, the data count too."""
    return sigma if config.timestep_spacing != "leading" else (sigma**2 + 1) ** 0.5


def step_churn(sigma: float, num_steps: int, churn: float, churn_from: float, churn_to: float) -> float:
    """Return how much a step's sigma grows by new noise."""
    return min(churn / num_steps, LARGEST_CHURN) if churn_from <= sigma <= churn_to else 0.0
