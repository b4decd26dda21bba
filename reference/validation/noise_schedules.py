"""Calls of noise schedules."""

from typing import Any

from gaugeblock.reference.configs import DiffusionScheduleConfig, EDMScheduleConfig, FlowScheduleConfig
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_between,
    require_dtype,
    require_interval,
    require_number,
    require_positive,
    require_shape,
)


def schedule_config(config: Any, kind: type) -> None:
    """Check that a config is of its kind."""
    if not isinstance(config, kind):
        raise TypeError(f"config must be a {kind.__name__}, got {type(config).__name__}")


def diffusion_schedule(config: Any, num_steps: Any = 1) -> None:
    """Check how a schedule of discrete timesteps is asked for."""
    schedule_config(config, DiffusionScheduleConfig)
    require_between("num_steps", num_steps, 1, config.num_train_timesteps, "num_train_timesteps=")


def flow_schedule(config: Any, num_steps: Any = 1, mu: Any = None) -> None:
    """Check how a flow's schedule is asked for."""
    schedule_config(config, FlowScheduleConfig)
    require_between("num_steps", num_steps, 1, 2**31 - 1)
    if mu is not None:
        require_number("mu", mu)
    if (mu is not None) != config.use_dynamic_shifting:
        raise ValueError(f"mu must be given if and only if shifting is dynamic ({config.use_dynamic_shifting}), got {mu}")


def dynamic_mu(config: Any, num_image_tokens: Any) -> None:
    """Check the arguments of `noise_schedules.dynamic_mu`."""
    schedule_config(config, FlowScheduleConfig)
    require_between("num_image_tokens", num_image_tokens, 1, 2**31 - 1)


def edm_schedule(config: Any, num_steps: Any = 1) -> None:
    """Check how EDM's schedule is asked for."""
    schedule_config(config, EDMScheduleConfig)
    require_between("num_steps", num_steps, 1, 2**31 - 1)


def cumulative_alphas(alphas_cumprod: Any) -> None:
    """Check numbers of a table of alphas_cumprod."""
    require_dtype("alphas_cumprod", alphas_cumprod, ("float32", "float64"))
    require_shape("alphas_cumprod", alphas_cumprod, batch_size=None)
    require_interval("alphas_cumprod", alphas_cumprod, 0, 1)


def shift_sigmas(sigmas: Any, shift: Any) -> None:
    """Check the arguments of `noise_schedules.shift_sigmas`."""
    require_dtype("sigmas", sigmas, FLOATING)
    require_shape("sigmas", sigmas, batch_size=None)
    require_interval("sigmas", sigmas, 0, 1)
    require_positive("shift", shift)
