"""diffusers' schedulers on trial; imported only where diffusers is installed.

A scheduler has one step for a whole batch, and a table: each example gets one of its own, with the two rates that its step goes
from and to. Draws that schedulers make themselves are replaced by those of the call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.schedulers import (
    scheduling_ddpm,
    scheduling_edm_euler,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
)

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer


def example_by_example(step: Callable[..., torch.Tensor], *arrays: torch.Tensor) -> torch.Tensor:
    """The step of each example of a batch, which may be empty."""
    examples = zip(*(each.split(1) for each in arrays), strict=True)
    return torch.cat([step(*each) for each in examples]) if len(arrays[0]) else torch.zeros_like(arrays[0])


@contextmanager
def drawing(module: Any, noise: torch.Tensor) -> Iterator[None]:
    """Makes a scheduler's module draw this noise."""
    with mock.patch.object(module, "randn_tensor", lambda *shape, **how: noise):
        yield


def of_two_rates(scheduler: Any, a: torch.Tensor, previous: torch.Tensor) -> Any:
    """With timesteps 1 and 0."""
    scheduler.set_timesteps(2)
    scheduler.timesteps = torch.tensor([1, 0])
    scheduler.alphas_cumprod = torch.cat([previous, a])
    return scheduler


def of_two_sigmas(scheduler: Any, sigma: torch.Tensor, after: torch.Tensor) -> Any:
    """With a step from one to the other, and none before."""
    scheduler.set_timesteps(1)
    scheduler.sigmas, scheduler.timesteps = torch.cat([sigma, after]), torch.zeros(1)
    scheduler.is_scale_input_called = True
    return scheduler


def of_long_steps(case: Case) -> bool:
    """Where 1 - a / p and 1 - p - s**2 keep their digits in float32."""
    return case.regime != "adversarial" and case.parameters.get("eta", 0) < 1


def clipping(config: Any) -> dict[str, Any]:
    """Of a config, by the same names."""
    names = ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value")
    return {name: getattr(config, name) for name in names}


@peer("sampler_steps.ddpm_step", dtypes=DTYPES, rounding="eager", oracle=True, differentiable=False, fits=of_long_steps)
class DiffusersDdpm:
    """DDPMScheduler.step."""

    def __call__(self, noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod, *, config):
        def step(x, p, z, a, previous):
            scheduler = DDPMScheduler(
                num_train_timesteps=2, prediction_type=config.prediction_type, variance_type=config.variance_type,
                **clipping(config),
            )  # fmt: skip
            with drawing(scheduling_ddpm, z):
                return of_two_rates(scheduler, a, previous).step(p, 1, x).prev_sample

        return example_by_example(step, noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod).to(noised.dtype)


@peer("sampler_steps.ddim_step", dtypes=DTYPES, rounding="eager", oracle=True, differentiable=False, fits=of_long_steps)
class DiffusersDdim:
    """DDIMScheduler.step."""

    def __call__(
        self, noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod, *, config, eta, use_clipped_model_output
    ):
        def step(x, p, z, a, previous):
            scheduler = of_two_rates(
                DDIMScheduler(num_train_timesteps=2, prediction_type=config.prediction_type, **clipping(config)), a, previous
            )
            how = {"eta": eta, "use_clipped_model_output": use_clipped_model_output, "variance_noise": z}
            return scheduler.step(p, 1, x, **how).prev_sample

        return example_by_example(step, noised, prediction, noise, alphas_cumprod, previous_alphas_cumprod).to(noised.dtype)


@peer("sampler_steps.euler_step", dtypes=DTYPES, rounding="eager", oracle=True, differentiable=False)
class DiffusersEuler:
    """EulerDiscreteScheduler.step, of one step, which gets all of the churn."""

    def __call__(self, noised, prediction, noise, sigmas, next_sigmas, *, prediction_type, churn, noise_scale):
        def step(x, p, z, sigma, after):
            scheduler = of_two_sigmas(EulerDiscreteScheduler(prediction_type=prediction_type), sigma, after)
            with drawing(scheduling_euler_discrete, z):
                return scheduler.step(p, torch.zeros(()), x, s_churn=churn, s_noise=noise_scale).prev_sample

        return example_by_example(step, noised, prediction, noise, sigmas, next_sigmas)


@peer("sampler_steps.edm_step", dtypes=DTYPES, rounding="eager", oracle=True, differentiable=False)
class DiffusersEdm:
    """EDMEulerScheduler.step, of one step, which gets all of the churn."""

    def __call__(self, noised, prediction, noise, sigmas, next_sigmas, *, config, churn, noise_scale):
        def step(x, p, z, sigma, after):
            scheduler = EDMEulerScheduler(prediction_type=config.prediction_type, sigma_data=config.sigma_data)
            with drawing(scheduling_edm_euler, z):
                made = of_two_sigmas(scheduler, sigma, after)
                return made.step(p, torch.zeros(()), x, s_churn=churn, s_noise=noise_scale).prev_sample

        return example_by_example(step, noised, prediction, noise, sigmas, next_sigmas)


@peer("sampler_steps.heun_step", dtypes=DTYPES, rounding="eager", oracle=True, differentiable=False)
class DiffusersHeun:
    """HeunDiscreteScheduler.step in its second order, which is given the first one's slope."""

    def __call__(self, noised, prediction, euler_noised, euler_prediction, sigmas, next_sigmas, *, config):
        how = {"prediction_type": config.prediction_type, "clip_sample": config.clip_sample}

        def step(x, p, euler_x, euler_p, sigma, after):
            scheduler = HeunDiscreteScheduler(clip_sample_range=config.clip_sample_range, **how)
            scheduler.sigmas = torch.cat([sigma, after, after, 0 * after])
            scheduler.set_begin_index(0)
            scheduler.step(p, 0, x)
            return scheduler.step(euler_p, 0, euler_x).prev_sample

        found = example_by_example(step, noised, prediction, euler_noised, euler_prediction, sigmas, next_sigmas)
        return found.to(noised.dtype)


@peer("sampler_steps.flow_step", dtypes=DTYPES, rounding="eager", oracle=True, differentiable=False)
class DiffusersFlow:
    """FlowMatchEulerDiscreteScheduler.step."""

    def __call__(self, noised, prediction, noise, sigmas, next_sigmas, *, stochastic_sampling):
        def step(x, v, z, sigma, after):
            scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=stochastic_sampling)
            with drawing(scheduling_flow_match_euler_discrete, z):
                return of_two_sigmas(scheduler, sigma, after).step(v, torch.zeros(()), x).prev_sample

        return example_by_example(step, noised, prediction, noise, sigmas, next_sigmas)
