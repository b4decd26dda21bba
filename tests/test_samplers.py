"""Samplers: whole ways beside diffusers' schedulers, known single steps, draws, clipping, twins."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from wide_floats import float32_is_float64

from gaugeblock.reference import noise_tables
from gaugeblock.reference.configs import (
    DIFFUSION_SCHEDULE_PRESETS,
    DiffusionScheduleConfig,
    EDMScheduleConfig,
    FlowScheduleConfig,
)
from gaugeblock.reference.jax import sampler_steps as jax_sampler_steps
from gaugeblock.reference.jax import samplers as jax_samplers
from gaugeblock.reference.torch import sampler_steps, samplers

SD = DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-1"]
SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STEPS, SEED = 13, 7
IDS = torch.tensor([4, 0, 2**32 - 1])
CLIPPINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.75},
    "thresholded": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
}


NOISE = samplers.starting_noise(IDS, shape=(2, 3, 5), seed=SEED).double()  # once: where float32 is float64 it would be another


def model(x: Any, timesteps: Any) -> Any:
    """Something that depends on both, in either framework, and is not small where x is large."""
    sin = jnp.sin if isinstance(x, jax.Array) else torch.sin
    return 0.7 * sin(1.5 * x) + 0.2 * x + (timesteps / 4000).reshape(-1, 1, 1, 1)


def of_both(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """With a share of the variance in as many channels more."""
    return torch.cat([model(x, timesteps), torch.cos(3 * x)], 1)


def options(config: Any) -> dict[str, Any]:
    """What a scheduler of diffusers has of a config's fields."""
    return {name: value for name, value in vars(config).items() if name not in ("sigma_schedule", "sigma_min", "sigma_max")}


@contextmanager
def given_draws(scheduler: Any, steps: Iterable[int] = range(STEPS), last: float = 1.0) -> Iterator[None]:
    """Makes a scheduler take the draws that our samplers make in these steps; of the last one so much."""
    draws = [samplers.step_noise(NOISE, IDS, step=n, seed=SEED) * (1 if n < STEPS - 1 else last) for n in steps]
    given = iter(draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module(type(scheduler).__module__), "randn_tensor", lambda *shape, **how: next(given))
        yield


def walk(scheduler: Any, predict: Callable[..., torch.Tensor] = model, scaled: bool = True, **how: Any) -> torch.Tensor:
    """A whole way of a scheduler, as a pipeline goes it."""
    x = NOISE * (scheduler.init_noise_sigma if scaled else 1)
    for timestep in scheduler.timesteps:
        at = scheduler.scale_model_input(x, timestep) if scaled else x
        x = scheduler.step(predict(at, timestep.double().expand(len(x))), timestep, x, **how).prev_sample
        assert x.dtype == torch.float64
    return x


def assert_same_end(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """In float64: some hundred roundings of 1e-16 on the way."""
    assert actual.dtype == torch.float64 and expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_ddpm_goes_the_way_of_diffusers(spacing, prediction_type, clipping):
    for variance_type in ("fixed_small", "fixed_large", "learned_range"):
        config = replace(
            SD, timestep_spacing=spacing, prediction_type=prediction_type, variance_type=variance_type, **CLIPPINGS[clipping]
        )
        names = DDPMScheduler().config
        scheduler = DDPMScheduler(**{name: value for name, value in options(config).items() if name in names})
        scheduler.set_timesteps(STEPS)
        scheduler.alphas_cumprod = torch.tensor(noise_tables.cumulative_alphas(noise_tables.betas(config)), dtype=torch.float64)
        scheduler.one = torch.ones((), dtype=torch.float64)
        predict = of_both if variance_type == "learned_range" else model
        # theirs draws once more in the last step, where its timestep is not 0; that is of variance 1e-20, or of fixed_large a bug
        with given_draws(scheduler, last=0):
            expected = walk(scheduler, predict)
        actual = samplers.ddpm_sample(predict, NOISE, IDS, config=config, num_steps=STEPS, seed=SEED)
        assert_same_end(actual, expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_ddim_goes_the_way_of_diffusers(spacing, prediction_type, clipping):
    for eta, use_clipped, to_one, rescaled in ((0.0, False, True, False), (0.6, True, False, False), (1.0, False, False, True)):
        if rescaled and prediction_type == "epsilon":
            continue  # of nothing but noise
        config = replace(
            SD, timestep_spacing=spacing, prediction_type=prediction_type, set_alpha_to_one=to_one,
            rescale_betas_zero_snr=rescaled, **CLIPPINGS[clipping],
        )  # fmt: skip
        names = DDIMScheduler().config
        scheduler = DDIMScheduler(**{name: value for name, value in options(config).items() if name in names})
        scheduler.set_timesteps(STEPS)
        table = torch.tensor(noise_tables.cumulative_alphas(noise_tables.betas(config)), dtype=torch.float64)
        scheduler.alphas_cumprod = table
        scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64) if to_one else table[0]
        with given_draws(scheduler):
            expected = walk(scheduler, eta=eta, use_clipped_model_output=use_clipped)
        actual = samplers.ddim_sample(
            model, NOISE, IDS, config=config, num_steps=STEPS, seed=SEED, eta=eta, use_clipped_model_output=use_clipped
        )
        assert_same_end(actual, expected)


def with_our_sigmas(scheduler: Any, sigmas: list[float], timesteps: list[float]) -> Any:
    """A scheduler in whose place float32 tables stood."""
    scheduler.sigmas, scheduler.timesteps = (torch.tensor(each, dtype=torch.float64) for each in (sigmas, timesteps))
    return scheduler


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["interpolated", "karras"])
def test_euler_goes_the_way_of_diffusers(spacing, prediction_type, schedule):
    config = replace(SD, timestep_spacing=spacing, prediction_type=prediction_type, sigma_schedule=schedule)
    windows: tuple[dict[str, float], ...] = ({}, {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 5.0, "s_noise": 1.003})
    for window in (*windows, {"s_churn": 40.0}):
        scheduler = EulerDiscreteScheduler(prediction_type=prediction_type, timestep_spacing=spacing)
        scheduler.set_timesteps(STEPS)
        with_our_sigmas(scheduler, *noise_tables.sigmas(config, STEPS))
        inside = [window.get("s_tmin", 0) <= each <= window.get("s_tmax", 1e9) for each in scheduler.sigmas[:-1]]
        with given_draws(scheduler, [n for n, each in enumerate(inside) if each]), float32_is_float64():
            expected = walk(scheduler, **window)
        churn = {"churn": "s_churn", "churn_from": "s_tmin", "churn_to": "s_tmax", "noise_scale": "s_noise"}
        ours = {name: window[theirs] for name, theirs in churn.items() if theirs in window}
        actual = samplers.sigma_euler_sample(model, NOISE, IDS, config=config, num_steps=STEPS, seed=SEED, **ours)
        assert_same_end(actual, expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("clipping", ["as they are", "clipped"])
def test_heun_goes_the_way_of_diffusers(spacing, prediction_type, clipping):
    config = replace(SD, timestep_spacing=spacing, prediction_type=prediction_type, **CLIPPINGS[clipping])
    scheduler = HeunDiscreteScheduler(prediction_type=prediction_type, timestep_spacing=spacing, **CLIPPINGS[clipping])
    scheduler.set_timesteps(STEPS)
    sigmas, timesteps = noise_tables.sigmas(config, STEPS)
    twice = [each for each in sigmas[1:-1] for _ in range(2)], [each for each in timesteps[1:] for _ in range(2)]
    with_our_sigmas(scheduler, [sigmas[0], *twice[0], sigmas[-1]], [timesteps[0], *twice[1]])
    assert len(scheduler.timesteps) == 2 * STEPS - 1
    assert_same_end(samplers.heun_sample(model, NOISE, config=config, num_steps=STEPS), walk(scheduler))


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flows_go_the_way_of_diffusers(stochastic, shift):
    config = FlowScheduleConfig(shift=shift, stochastic_sampling=stochastic)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic)
    scheduler.set_timesteps(STEPS)
    with_our_sigmas(scheduler, *noise_tables.flow_sigmas(config, STEPS, None))
    with given_draws(scheduler), float32_is_float64():
        expected = walk(scheduler, scaled=False)
    assert_same_end(samplers.flow_sample(model, NOISE, IDS, config=config, num_steps=STEPS, seed=SEED), expected)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("churn", [0.0, 4.0])
def test_edm_goes_the_way_of_diffusers(prediction_type, churn):
    config = EDMScheduleConfig(prediction_type=prediction_type, sigma_data=0.6)
    scheduler = EDMEulerScheduler(prediction_type=prediction_type, sigma_data=0.6)
    scheduler.set_timesteps(STEPS)
    with_our_sigmas(scheduler, *noise_tables.edm_sigmas(config, STEPS))
    with given_draws(scheduler), float32_is_float64():
        expected = walk(scheduler, s_churn=churn)
    actual = samplers.edm_sample(model, NOISE, IDS, config=config, num_steps=STEPS, seed=SEED, churn=churn)
    assert_same_end(actual, expected)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_schedulers_as_people_have_them_lie_a_few_roundings_of_their_tables_off(spacing):
    """Nothing is replaced: tables and steps of diffusers in float32. The rates of each step are off by some 1200 half ulps."""
    config = replace(SD, timestep_spacing=spacing)
    names = DDIMScheduler().config
    scheduler = DDIMScheduler(**{name: value for name, value in options(config).items() if name in names})
    scheduler.set_timesteps(STEPS)
    x = NOISE.float()
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep.float().expand(len(x))), timestep, x).prev_sample
    ours = samplers.ddim_sample(model, NOISE, IDS, config=config, num_steps=STEPS, seed=SEED)
    in_float32 = samplers.ddim_sample(model, NOISE.float(), IDS, config=config, num_steps=STEPS, seed=SEED)
    for each in (x, in_float32):
        assert each.dtype == torch.float32
        assert (each.double() - ours).abs().max() <= STEPS * 1200 * 2.0**-24 * ours.abs().max()


def rates(*values: float) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value], dtype=torch.float64) for value in values)


def test_steps_have_known_results():
    """x = 0.5, and the model says 0.2; numbers of float32 tables."""
    table = noise_tables.cumulative_alphas(noise_tables.betas(SD))
    x, said, zero, one = (torch.full((1, 1), value, dtype=torch.float64) for value in (0.5, 0.2, 0.0, 1.0))
    ddim = rates(table[501], table[401])
    results = {
        "ddim": (sampler_steps.ddim_step(x, said, zero, *ddim, config=SD, eta=0.0), 0.5607929),
        "ddim, new noise": (sampler_steps.ddim_step(x, said, one, *ddim, config=SD, eta=1.0), 1.0457809),
        "ddpm": (sampler_steps.ddpm_step(x, said, one, *rates(table[500], table[499]), config=SD), 0.5693989),
    }
    sigmas, _ = noise_tables.sigmas(replace(SD, timestep_spacing="linspace"), 4)
    euler = sampler_steps.euler_step(x, said, zero, *rates(*sigmas[:2]), prediction_type="epsilon")
    results["euler"] = euler, -1.8392677
    sigmas, _ = noise_tables.flow_sigmas(FlowScheduleConfig(shift=3.0), 4, None)
    results["flow"] = sampler_steps.flow_step(x, said, zero, *rates(*sigmas[:2]), stochastic_sampling=False), 0.4715385
    sigmas, _ = noise_tables.edm_sigmas(EDMScheduleConfig(), 4)
    results["edm"] = sampler_steps.edm_step(x, said, zero, *rates(*sigmas[:2]), config=EDMScheduleConfig()), 0.1486315
    for name, (actual, known) in results.items():
        assert actual.item() == pytest.approx(known, rel=2e-6), name


def test_examples_of_one_batch_may_be_at_different_steps():
    torch.manual_seed(0)
    x, said, z = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    a, p = torch.tensor([0.1, 0.5, 0.9, 0.3]).double(), torch.tensor([0.2, 0.6, 1.0, 0.9]).double()
    together = sampler_steps.ddpm_step(x, said, z, a, p, config=SD)
    alone = [
        sampler_steps.ddpm_step(*(each[n : n + 1] for each in (x, said, z)), a[n : n + 1], p[n : n + 1], config=SD)
        for n in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-15, atol=0)


def test_a_full_ddim_is_ddpm_of_the_small_variance():
    torch.manual_seed(0)
    x, said, z = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    a, p = torch.tensor([0.1, 0.5, 0.9, 1e-6]).double(), torch.tensor([0.2, 0.6, 1.0, 0.9]).double()
    ddim = sampler_steps.ddim_step(x, said, z, a, p, config=SD, eta=1.0)
    torch.testing.assert_close(ddim, sampler_steps.ddpm_step(x, said, z, a, p, config=SD), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_new_noise_leaves_no_negative_variance_where_nothing_else_is_left(eta):
    x, said, z = torch.ones(3, 2, 2)
    a, p = torch.tensor([2.0**-24, 1e-30]), torch.tensor([0.3, 1 - 2.0**-24])
    config = replace(SD, prediction_type="v_prediction")
    assert sampler_steps.ddim_step(x, said, z, a, p, config=config, eta=eta).isfinite().all()
    nothing = torch.zeros(2)
    assert sampler_steps.ddim_step(x, said, z, nothing, p, config=config, eta=eta).isfinite().all()
    assert sampler_steps.ddpm_step(x, said, z, nothing, p, config=config).isfinite().all()


# Where all data lie at one point, a model that knows it sends every sampler there.
POINT = 0.4


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_samplers_find_the_only_data_there_are(prediction_type):
    config = replace(SD, prediction_type=prediction_type, timestep_spacing="trailing", set_alpha_to_one=True)
    table = torch.tensor(noise_tables.cumulative_alphas(noise_tables.betas(config)), dtype=torch.float64)

    def knows(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        a = table[timesteps.long()].reshape(-1, 1, 1, 1)
        epsilon = (x - a.sqrt() * POINT) / (1 - a).sqrt()
        says = {"epsilon": epsilon, "sample": torch.full_like(x, POINT), "v_prediction": a.sqrt() * epsilon}
        return says[prediction_type] - ((1 - a).sqrt() * POINT if prediction_type == "v_prediction" else 0)

    how = {"config": config, "num_steps": STEPS, "seed": SEED}
    ends = [
        samplers.ddpm_sample(knows, NOISE, IDS, **how),
        samplers.ddim_sample(knows, NOISE, IDS, **how, eta=0.7, constant_stride=False),
        samplers.sigma_euler_sample(knows, NOISE, IDS, **how),
        samplers.heun_sample(knows, NOISE, config=config, num_steps=STEPS),
    ]
    for end in ends:
        torch.testing.assert_close(end, torch.full_like(end, POINT), rtol=0, atol=1e-12)


def test_draws_belong_to_examples_and_steps():
    config = replace(SD, prediction_type="sample")
    how = {"config": config, "num_steps": 3, "seed": SEED}
    together = samplers.ddpm_sample(model, NOISE, IDS, **how)
    alone = samplers.ddpm_sample(model, NOISE[1:2], IDS[1:2], **how)
    assert together[1:2].equal(alone)
    other = samplers.ddpm_sample(model, NOISE, IDS, **(how | {"seed": SEED + 1}))
    assert (other != together).any(dim=(1, 2, 3)).all()
    first, second = (samplers.step_noise(NOISE, IDS, step=n, seed=SEED) for n in range(2))
    assert (first != second).all() and (first[0] != first[1]).all() and (first != NOISE).all()


def everything(module: Any, steps: Any, start: Any, ids: Any) -> Iterator[Any]:
    for prediction_type in PREDICTIONS:
        config = replace(SD, prediction_type=prediction_type, **CLIPPINGS["thresholded"])
        how = {"config": config, "num_steps": 5, "seed": SEED}
        yield module.ddpm_sample(model, start, ids, **how)
        yield module.ddim_sample(model, start, ids, **how, eta=0.6, use_clipped_model_output=True)
        yield module.sigma_euler_sample(model, start, ids, **how, churn=2.0)
        yield module.heun_sample(model, start, config=replace(config, clip_sample=True), num_steps=5)
    yield module.edm_sample(model, start, ids, config=EDMScheduleConfig(), num_steps=5, seed=SEED, churn=2.0)
    for stochastic in (False, True):
        flow = FlowScheduleConfig(shift=3.0, stochastic_sampling=stochastic)
        yield module.flow_sample(model, start, ids, config=flow, num_steps=5, seed=SEED)
    learned = replace(SD, variance_type="learned_range")
    doubled, table = model(start, ids * 0), noise_tables.cumulative_alphas(noise_tables.betas(SD))
    at = [module.for_each(start, table[n]) for n in (500, 400)]
    concatenate = jnp.concatenate if isinstance(start, jax.Array) else torch.cat
    yield steps.ddpm_step(start, concatenate([doubled, doubled / 2], 1), start / 3, *at, config=learned)


def test_jax_samplers_are_those_of_torch():
    with jax.enable_x64(True):
        theirs = [np.asarray(each) for each in everything(
            jax_samplers, jax_sampler_steps, jnp.asarray(NOISE.numpy()), jnp.asarray(IDS.numpy())
        )]  # fmt: skip
    for actual, expected in zip(theirs, everything(samplers, sampler_steps, NOISE, IDS), strict=True):
        assert actual.dtype == np.float64
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_an_empty_batch_is_sampled():
    empty, none = torch.zeros(0, 2, 3, 5), torch.zeros(0, dtype=torch.int64)
    for each in everything(samplers, sampler_steps, empty, none):
        assert each.shape == empty.shape
    for each in everything(jax_samplers, jax_sampler_steps, jnp.zeros(empty.shape), jnp.zeros(0, int)):
        assert each.shape == empty.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"noise": torch.zeros(3, 2).half()}, TypeError, "noise must be float32 or float64, got float16"),
        ({"example_ids": torch.zeros(2).long()}, ValueError, r"example_ids must be [batch_size=3], got (2,)"),
        ({"example_ids": torch.zeros(3)}, TypeError, "example_ids must be int8 or"),
        ({"num_steps": 0}, ValueError, "num_steps must be in 1.."),
        ({"config": FlowScheduleConfig()}, TypeError, "config must be a DiffusionScheduleConfig"),
    ],
)
def test_a_bad_call_names_its_argument(change, error, message):
    for module, convert in ((samplers, lambda each: each), (jax_samplers, lambda each: jnp.asarray(each.numpy()))):
        call = {
            "noise": torch.zeros(3, 2),
            "example_ids": torch.zeros(3).long(),
            "config": SD,
            "num_steps": 4,
            "seed": 0,
        } | change
        call = {name: convert(each) if isinstance(each, torch.Tensor) else each for name, each in call.items()}
        for sampler in (module.ddpm_sample, module.ddim_sample, module.sigma_euler_sample):
            with pytest.raises(error, match="^" + re.escape(message)):
                sampler(model, **call)


@pytest.mark.parametrize("module", [sampler_steps, jax_sampler_steps])
def test_noise_says_nothing_of_data_that_are_gone(module):
    make = torch.tensor if module is sampler_steps else jnp.asarray
    x, nothing, some = make([[1.0, 2.0]]), make([0.0]), make([0.5])
    for step in (module.ddpm_step, lambda *arrays, config: module.ddim_step(*arrays, config=config, eta=0.0)):
        with pytest.raises(ValueError, match=r"^alphas_cumprod must be in \(0, 1\), got 0.0..0.0"):
            step(x, x, x, nothing, some, config=SD)
        assert step(x, x, x, nothing, some, config=replace(SD, prediction_type="sample")).shape == (1, 2)
    with pytest.raises(ValueError, match=r"^sigmas must be in \(0, inf\)"):
        module.euler_step(x, x, x, nothing, nothing, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"^next_sigmas must be in \(0, inf\)"):
        module.heun_step(x, x, x, x, some, nothing, config=SD)


def test_configs_hold_what_diffusers_calls_them():
    for name in ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "steps_offset"):
        assert name in DDPMScheduler().config and hasattr(DiffusionScheduleConfig(), name)
