"""Noise schedules: how much noise there is at each timestep, and which timesteps or sigmas a sampler visits.

Tables are computed in float64 by `gaugeblock.reference.noise_tables`, which has their formulas.

Shapes: B batch_size.
"""

import torch

from gaugeblock.reference import noise_tables, validation
from gaugeblock.reference.configs import DiffusionScheduleConfig, EDMScheduleConfig, FlowScheduleConfig
from gaugeblock.reference.torch.precision import at_least_float32


def betas(config: DiffusionScheduleConfig) -> torch.Tensor:
    """Return the share of the variance that each timestep replaces by noise.

        linear             beta[t] = beta_start + t / (T - 1) * (beta_end - beta_start)
        scaled_linear      sqrt(beta) is linear
        squaredcos_cap_v2  beta[t] = min(1 - f((t + 1) / T) / f(t / T), 0.999),  f(s) = cos((s + 0.008) / 1.008 * pi / 2)**2
        sigmoid            beta[t] = beta_start + (beta_end - beta_start) * sigmoid(12 t / (T - 1) - 6)

    With rescale_betas_zero_snr, sqrt(alphas_cumprod) is then shifted to 0 at the last timestep and scaled to its first value.

    Args:
        config: Of the schedule.

    Returns:
        [num_train_timesteps], float64, in timesteps 0, 1, ...

    Raises:
        TypeError: `config` is none of a schedule of timesteps.

    Source: Ho et al. (arXiv:2006.11239), section 4; Rombach et al. (arXiv:2112.10752); Nichol and Dhariwal (arXiv:2102.09672),
    equation 17; Xu et al. (arXiv:2203.02923); rescaling: Lin et al. (arXiv:2305.08891), algorithm 1.
    """
    validation.diffusion_schedule(config)
    return torch.tensor(noise_tables.betas(config), dtype=torch.float64)


def alphas_cumprod(config: DiffusionScheduleConfig) -> torch.Tensor:
    """Return how much of the data's variance is left at each timestep: the products of 1 - beta up to it.

    Args: as of `betas`.

    Returns:
        [num_train_timesteps], float64.

    Raises: as `betas`.

    Source: Ho et al. (arXiv:2006.11239), equation 4.
    """
    validation.diffusion_schedule(config)
    return torch.tensor(noise_tables.cumulative_alphas(noise_tables.betas(config)), dtype=torch.float64)


def timesteps(config: DiffusionScheduleConfig, num_steps: int) -> torch.Tensor:
    """Return the timesteps that DDPM and DDIM visit, from noise to data.

        linspace  num_steps of them from T - 1 to 0, rounded to whole numbers
        leading   0, T // num_steps, 2 (T // num_steps), ..., backwards, plus steps_offset
        trailing  T, T - T / num_steps, ..., rounded, minus 1

    Args:
        config: Of the schedule.
        num_steps: In 1..num_train_timesteps.

    Returns:
        [num_steps], int64, as in diffusers, but for 62 of the counts up to 1000 that have one timestep more there, -1, where
        spacing is "trailing".

    Raises:
        TypeError: `config` is none of a schedule of timesteps, or `num_steps` no integer.
        ValueError: `num_steps` is out of its range, or leaves no room for steps_offset.

    Source: Lin et al. (arXiv:2305.08891), table 2.
    """
    validation.diffusion_schedule(config, num_steps)
    return torch.tensor(noise_tables.timesteps(config, num_steps))


def previous_timesteps(config: DiffusionScheduleConfig, num_steps: int, *, constant_stride: bool) -> torch.Tensor:
    """Return where each step leads to: the timestep that is visited next, or the one num_train_timesteps // num_steps lower.

    The second is what DDIM does in public schedulers, and leads off the timesteps visited wherever these are not "leading": of 13
    trailing ones, 999 is followed by 922, but its step leads to 923.

    Args:
        config: Of the schedule.
        num_steps: In 1..num_train_timesteps.
        constant_stride: Which of the two.

    Returns:
        [num_steps], int64; -1 for the data.

    Raises: as `timesteps`.

    Source: diffusers' DDPMScheduler and DDIMScheduler.
    """
    validation.diffusion_schedule(config, num_steps)
    return torch.tensor(noise_tables.previous_timesteps(config, num_steps, constant_stride=constant_stride))


def sigmas(config: DiffusionScheduleConfig, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sigmas that Euler's and Heun's methods visit, noise per data, and the timesteps that the model is told.

        table[t]      sqrt((1 - alphas_cumprod[t]) / alphas_cumprod[t])
        interpolated  the table, linear between timesteps; those of "linspace" are not rounded
        karras        (first**(1/7) + r * (last**(1/7) - first**(1/7)))**7,  r from 0 to 1
        exponential   linear in log(sigma)
        beta          last + (first - last) * quantile of Beta(0.6, 0.6) at 1 - r

    first and last are sigma_max and sigma_min, or those of the first and the last timestep. But for "interpolated", the timestep
    of a sigma is where log(table) is log(sigma), linear between the entries of the table.

    Args: as of `timesteps`.

    Returns:
        sigmas: [num_steps + 1], float64; after the last step 0, or the table's first.
        timesteps: [num_steps], float64.

    Raises: as `timesteps`.

    Source: Karras et al. (arXiv:2206.00364), equation 5; Lee et al. (arXiv:2407.12173); diffusers' EulerDiscreteScheduler.
    """
    validation.diffusion_schedule(config, num_steps)
    visited, told = noise_tables.sigmas(config, num_steps)
    return torch.tensor(visited, dtype=torch.float64), torch.tensor(told, dtype=torch.float64)


def flow_training_sigmas(config: FlowScheduleConfig) -> torch.Tensor:
    """Return the sigmas that a flow is trained at, from noise to data: (T - n) / T, shifted unless shifting is dynamic.

    Args:
        config: Of the schedule.

    Returns:
        [num_train_timesteps], float64, falling from 1; the model is told num_train_timesteps * sigma.

    Raises:
        TypeError: `config` is none of a flow's schedule.

    Source: Esser et al. (arXiv:2403.03206), section 5.3.2; diffusers' FlowMatchEulerDiscreteScheduler.
    """
    validation.schedule_config(config, FlowScheduleConfig)
    return torch.tensor(noise_tables.flow_table(config), dtype=torch.float64)


def flow_sigmas(config: FlowScheduleConfig, num_steps: int, *, mu: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sigmas that a flow's sampler visits, and the timesteps that the model is told.

        1. num_steps sigmas between the ends of the training's table, or 1, 1 - 1 / num_steps, ..., 1 / num_steps
        2. shifted by `shift`, or where shifting is dynamic by exp(mu) (or mu); the ends of a table that has a shift get it again
        3. with shift_terminal z:  sigma = 1 - (1 - sigma) * (1 - z) / (1 - last sigma)
        4. spread anew between the first and the last, if sigma_schedule says so

    Args:
        config: Of the schedule.
        num_steps: At least 1.
        mu: Where shifting is dynamic, how far; `dynamic_mu` says it for images.

    Returns:
        sigmas: [num_steps + 1], float64; the last is 0.
        timesteps: [num_steps], float64: num_train_timesteps * sigma.

    Raises:
        TypeError: `config` is none of a flow's schedule, `num_steps` no integer, or `mu` no number.
        ValueError: `num_steps` is not positive, or `mu` is missing or has no use.

    Source: as of `flow_training_sigmas`.
    """
    validation.flow_schedule(config, num_steps, mu)
    visited, told = noise_tables.flow_sigmas(config, num_steps, mu)
    return torch.tensor(visited, dtype=torch.float64), torch.tensor(told, dtype=torch.float64)


def dynamic_mu(config: FlowScheduleConfig, num_image_tokens: int) -> float:
    """Return the shift of an image: linear in its number of tokens, through the two points that the config has.

    Args:
        config: Of the schedule.
        num_image_tokens: Patches of the image's latents.

    Returns:
        mu.

    Raises:
        TypeError: `config` is none of a flow's schedule, or `num_image_tokens` no integer.
        ValueError: `num_image_tokens` is not positive.

    Source: black-forest-labs/flux, sampling.py.
    """
    validation.dynamic_mu(config, num_image_tokens)
    return noise_tables.dynamic_mu(config, num_image_tokens)


def edm_sigmas(config: EDMScheduleConfig, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sigmas that EDM's sampler visits, and what the model is told of them: log(sigma) / 4.

    Args:
        config: Of the schedule.
        num_steps: At least 1.

    Returns:
        sigmas: [num_steps + 1], float64; after the last step 0, or the last again.
        timesteps: [num_steps], float64.

    Raises:
        TypeError: `config` is none of EDM's, or `num_steps` no integer.
        ValueError: `num_steps` is not positive.

    Source: Karras et al. (arXiv:2206.00364), equation 5 and table 1.
    """
    validation.edm_schedule(config, num_steps)
    visited, told = noise_tables.edm_sigmas(config, num_steps)
    return torch.tensor(visited, dtype=torch.float64), torch.tensor(told, dtype=torch.float64)


def signal_and_noise(alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much there is of the data and of the noise: sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod).

    Args:
        alphas_cumprod: [batch_size], float32 or float64, in [0, 1].

    Returns:
        alphas, sigmas: [batch_size] each, dtype as alphas_cumprod.

    Raises:
        TypeError: `alphas_cumprod` is not an array of the dtype above.
        ValueError: It has another rank, or a value is out of its range.

    Source: Ho et al. (arXiv:2006.11239), equation 4.
    """
    validation.cumulative_alphas(alphas_cumprod)
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


def signal_to_noise(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Return the ratio of the variances of data and noise: alphas_cumprod / (1 - alphas_cumprod).

    Args: as of `signal_and_noise`.

    Returns:
        [batch_size], dtype as alphas_cumprod; infinite where there is no noise.

    Raises: as `signal_and_noise`.

    Source: Kingma et al. (arXiv:2107.00630), equation 2.
    """
    validation.cumulative_alphas(alphas_cumprod)
    return alphas_cumprod / (1 - alphas_cumprod)


def shift_sigmas(sigmas: torch.Tensor, *, shift: float) -> torch.Tensor:
    """Move the sigmas of a flow towards noise.

        out = shift * sigma / (1 + (shift - 1) * sigma),  so that  out / (1 - out) = shift * sigma / (1 - sigma)

    Args:
        sigmas: [batch_size], floating, in [0, 1].
        shift: Positive; 1 moves nothing.

    Returns:
        [batch_size], dtype as sigmas; computed in at least float32 and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `shift` is no number.
        ValueError: `sigmas` has another rank or a value out of its range, or `shift` is not positive.

    Source: Esser et al. (arXiv:2403.03206), equation 23.
    """
    validation.shift_sigmas(sigmas, shift)
    sigmas_B = at_least_float32(sigmas)
    return (shift * sigmas_B / (1 + (shift - 1) * sigmas_B)).to(sigmas.dtype)
