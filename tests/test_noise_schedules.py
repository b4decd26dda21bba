"""Noise schedules: known numbers, diffusers' tables, and where a number of steps is a trap."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from gaugeblock.reference import noise_tables
from gaugeblock.reference.configs import (
    DIFFUSION_SCHEDULE_PRESETS,
    EDM_SCHEDULE_PRESETS,
    FLOW_SCHEDULE_PRESETS,
    DiffusionScheduleConfig,
    EDMScheduleConfig,
    FlowScheduleConfig,
)
from gaugeblock.reference.jax import noise_schedules as jax_noise_schedules
from gaugeblock.reference.torch import noise_schedules

SD = DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-1"]
SD3, FLUX = FLOW_SCHEDULE_PRESETS["stable-diffusion-3"], FLOW_SCHEDULE_PRESETS["flux-dev"]
SPACINGS = ("linspace", "leading", "trailing")
UNIT = 2.0**-24  # half an ulp of 1 in float32


def diffusers_options(config: DiffusionScheduleConfig) -> dict:
    """What schedulers of diffusers have in common."""
    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
    )
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("linspace", [999, 916, 832, 749, 666, 583, 500, 416, 333, 250, 166, 83, 0]),
        ("leading", [913, 837, 761, 685, 609, 533, 457, 381, 305, 229, 153, 77, 1]),
        ("trailing", [999, 922, 845, 768, 691, 614, 537, 461, 384, 307, 230, 153, 76]),
    ],
)
def test_thirteen_steps_of_a_thousand_visit_known_timesteps(spacing, expected):
    config = replace(SD, timestep_spacing=spacing)
    assert noise_schedules.timesteps(config, 13).tolist() == expected
    _, told = noise_schedules.sigmas(config, 13)
    assert told.tolist()[:2] == ([999.0, 915.75] if spacing == "linspace" else expected[:2])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_visits_the_timesteps_of_diffusers(spacing):
    config, scheduler = replace(SD, timestep_spacing=spacing), DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    one_too_many = 0
    for num_steps in range(1, 1000):
        scheduler.set_timesteps(num_steps)
        theirs, ours = scheduler.timesteps.tolist(), noise_tables.timesteps(config, num_steps)
        if len(theirs) > num_steps:
            assert spacing == "trailing" and theirs[-1] == -1
            one_too_many += 1
            continue
        assert ours == theirs, num_steps
    assert one_too_many == (62 if spacing == "trailing" else 0)


@pytest.mark.parametrize("num_steps", [61, 103, 121, 1000])
def test_trailing_steps_are_as_many_as_were_asked_for_and_none_is_below_zero(num_steps):
    visited = noise_schedules.timesteps(replace(SD, timestep_spacing="trailing"), num_steps)
    assert len(visited) == num_steps and visited.min() >= 0 and (visited.diff() < 0).all()


def test_an_offset_that_leads_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match="num_steps must leave room for steps_offset=1, got 1000"):
        noise_schedules.timesteps(SD, 1000)


def test_ddpm_goes_to_the_timestep_visited_next_and_ddim_a_constant_stride_down():
    trailing = replace(SD, timestep_spacing="trailing")
    visited = noise_schedules.timesteps(trailing, 13).tolist()
    following = noise_schedules.previous_timesteps(trailing, 13, constant_stride=False).tolist()
    assert following == [*visited[1:], -1]
    strides = noise_schedules.previous_timesteps(trailing, 13, constant_stride=True).tolist()
    assert (strides[0], strides[-1]) == (923, 0)
    leading = noise_schedules.previous_timesteps(SD, 13, constant_stride=True).tolist()
    assert leading == [*noise_schedules.timesteps(SD, 13).tolist()[1:], -1]


@pytest.mark.parametrize(
    ("rescaled", "expected"),
    [(False, (0.999149978, 0.276332468, 0.00466009509)), (True, (0.999149978, 0.241018638, 0.0))],
)
def test_tables_have_known_numbers(rescaled, expected):
    alphas = noise_schedules.alphas_cumprod(replace(SD, rescale_betas_zero_snr=rescaled))
    # these are of a table in float32
    np.testing.assert_allclose(alphas[[0, 500, 999]], expected, rtol=30 * UNIT)
    assert alphas.dtype == torch.float64
    assert (alphas[-1] == 0) == rescaled


# diffusers has float32: 1 - beta and each product are off by half an ulp each. Errors go either way: 10 deviations are allowed,
# and measured are 16 half ulps of alphas_cumprod at most, and of the cosine's, whose last beta is 0.999, 220.
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_tables_are_those_of_diffusers_as_near_as_float32_is(schedule):
    config = replace(SD, beta_schedule=schedule)
    scheduler = DDPMScheduler(**diffusers_options(config))
    betas, alphas = noise_schedules.betas(config), noise_schedules.alphas_cumprod(config)
    # a linspace and one square or quotient, or 1 - quotient of cosines
    allowed = 8 * UNIT * (betas if schedule != "sigmoid" else config.beta_end)
    assert ((scheduler.betas.double() - betas).abs() <= allowed + UNIT * 1e-3).all()
    each = UNIT * (2 + 8 * betas / (1 - betas))
    assert ((scheduler.alphas_cumprod.double() - alphas).abs() <= 10 * each.square().cumsum(0).sqrt() * alphas).all()
    # the cosine's betas end at 0.999: what is left there is too little to be told from 0
    assert (alphas.diff() < 0).all() and 0 < alphas[-1] < alphas[0] < 1


def test_rescaled_tables_are_those_of_diffusers_and_end_at_zero():
    config = replace(SD, rescale_betas_zero_snr=True)
    scheduler = DDIMScheduler(**diffusers_options(config), rescale_betas_zero_snr=True)
    ours, theirs = noise_schedules.alphas_cumprod(config), scheduler.alphas_cumprod.double()
    # the root of alphas_cumprod is shifted by 0.068, and with it its error: 5 half ulps of 1 are measured
    assert (ours.sqrt() - theirs.sqrt()).abs().max() <= 10 * np.sqrt(1000) / 2 * UNIT
    assert theirs[-1] == ours[-1] == 0
    sigmas, _ = noise_schedules.sigmas(replace(config, timestep_spacing="trailing"), 4)
    assert sigmas[0] == pytest.approx(4096, rel=1e-6)
    assert noise_schedules.signal_to_noise(ours)[-1] == 0


# 1 - alphas_cumprod of a float32 table is off by an ulp of 1 at timestep 0, where it is 0.00085: sigma by half of that
SIGMA_ERROR = UNIT / 0.00085
LEAST_SLOPE = 0.0032  # of log(sigma), in each timestep
EULER = {
    ("interpolated", 4): [14.614647, 2.9183085, 0.9323584, 0.0291675, 0.0],
    ("karras", 5): [14.614647, 4.796544, 1.274105, 0.247952, 0.0291675, 0.0],
}


@pytest.mark.parametrize(("schedule", "num_steps"), EULER)
def test_sigmas_have_known_numbers(schedule, num_steps):
    sigmas, _ = noise_schedules.sigmas(replace(SD, timestep_spacing="linspace", sigma_schedule=schedule), num_steps)
    np.testing.assert_allclose(sigmas, EULER[schedule, num_steps], rtol=SIGMA_ERROR, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", ["interpolated", "karras", "exponential", "beta"])
def test_sigmas_are_those_of_diffusers(spacing, schedule):
    config = replace(SD, timestep_spacing=spacing, sigma_schedule=schedule)
    for kind in (EulerDiscreteScheduler, HeunDiscreteScheduler):
        use = {} if schedule == "interpolated" else {f"use_{schedule}_sigmas": True}
        scheduler = kind(**diffusers_options(config), **use)
        scheduler.set_timesteps(13)
        sigmas, told = noise_schedules.sigmas(config, 13)
        once = slice(None) if kind is EulerDiscreteScheduler else [0, *range(1, 24, 2), 25]  # Heun has all between twice
        theirs = scheduler.sigmas.double()[once]
        assert theirs.shape == sigmas.shape
        np.testing.assert_allclose(theirs, sigmas, rtol=SIGMA_ERROR, atol=0)
        timesteps = scheduler.timesteps.double()[once if kind is EulerDiscreteScheduler else once[:-1]]
        np.testing.assert_allclose(timesteps, told, rtol=0, atol=SIGMA_ERROR / LEAST_SLOPE)


def test_timesteps_of_sigmas_are_tied_to_them():
    table = noise_tables.sigma_table(SD)
    assert np.diff(np.log(table)).min() >= LEAST_SLOPE
    for place in (0, 0.25, 17.5, 500, 998.75, 999):
        low = min(int(place), 998)
        sigma = table[low] ** (1 - place + low) * table[low + 1] ** (place - low)
        assert noise_tables.timestep_of_sigma(table, sigma) == pytest.approx(place, abs=1e-9)
    assert noise_tables.timestep_of_sigma(table, 1e-4) == 0 and noise_tables.timestep_of_sigma(table, 1e4) == 999


def test_ends_of_sigmas_may_be_given():
    config = replace(SD, sigma_schedule="karras", sigma_min=0.1, sigma_max=10.0, final_sigmas_type="sigma_min")
    sigmas, _ = noise_schedules.sigmas(config, 6)
    assert sigmas[0] == pytest.approx(10) and sigmas[5] == pytest.approx(0.1) and len(sigmas) == 7
    assert sigmas[6].item() == noise_tables.sigma_table(config)[0]


def test_quantiles_of_the_beta_distribution_are_those_of_scipy():
    probabilities = np.linspace(0, 1, 257)
    ours = [noise_tables.beta_quantile(each) for each in probabilities]
    # both find a root; measured: 1.2e-15
    np.testing.assert_allclose(ours, scipy.stats.beta.ppf(probabilities, 0.6, 0.6), rtol=1e-14, atol=1e-15)


def test_flows_have_known_sigmas():
    table = noise_schedules.flow_training_sigmas(SD3)
    # to the digits that are written here: six, and seven
    known = [1, 0.9, 0.75, 0.5, 0.00299401]
    np.testing.assert_allclose(table[[0, 250, 500, 750, 999]], known, rtol=2e-6)
    visited, told = noise_schedules.flow_sigmas(SD3, 4)
    np.testing.assert_allclose(visited, [1, 0.8576923, 0.6021506, 0.00892857, 0], rtol=2e-7)
    np.testing.assert_allclose(told, 1000 * visited[:-1], rtol=1e-15)
    visited, _ = noise_schedules.flow_sigmas(FLUX, 4, mu=1.15)
    np.testing.assert_allclose(visited, [1, 0.9045308, 0.7595109, 0.5128441, 0], rtol=2e-7)
    assert noise_schedules.dynamic_mu(FLUX, 1024) == pytest.approx(0.63)
    assert noise_schedules.dynamic_mu(FLUX, 256) == 0.5 and noise_schedules.dynamic_mu(FLUX, 4096) == pytest.approx(1.15)


@pytest.mark.parametrize("name", FLOW_SCHEDULE_PRESETS)
@pytest.mark.parametrize("schedule", ["interpolated", "karras", "exponential", "beta"])
@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_flow_sigmas_are_those_of_diffusers(name, schedule, time_shift_type):
    config = replace(FLOW_SCHEDULE_PRESETS[name], sigma_schedule=schedule, time_shift_type=time_shift_type)
    use = {} if schedule == "interpolated" else {f"use_{schedule}_sigmas": True}
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=config.shift, use_dynamic_shifting=config.use_dynamic_shifting, shift_terminal=config.shift_terminal,
        time_shift_type=time_shift_type, **use,
    )  # fmt: skip
    np.testing.assert_allclose(scheduler.sigmas.double(), noise_schedules.flow_training_sigmas(config), rtol=8 * UNIT)
    mu = 0.8 if config.use_dynamic_shifting else None
    num_steps = 13
    from_one = {} if config.first_sigmas == "training range" else {"sigmas": np.linspace(1, 1 / num_steps, num_steps)}
    scheduler.set_timesteps(num_steps, mu=mu, **from_one)
    visited, told = noise_schedules.flow_sigmas(config, num_steps, mu=mu)
    # 1 - sigma, of which the terminal is made, is off by an ulp of 1
    allowed = 8 * UNIT / (1 if config.shift_terminal is None else config.shift_terminal)
    np.testing.assert_allclose(scheduler.sigmas.double(), visited, rtol=allowed, atol=0)
    np.testing.assert_allclose(scheduler.timesteps.double(), told, rtol=allowed, atol=0)


def test_a_shift_is_an_odds_ratio_so_that_two_are_one_of_their_product():
    sigmas = torch.linspace(0, 1, 9, dtype=torch.float64)
    once = noise_schedules.shift_sigmas(sigmas, shift=6.0)
    twice = noise_schedules.shift_sigmas(noise_schedules.shift_sigmas(sigmas, shift=2.0), shift=3.0)
    torch.testing.assert_close(twice, once, rtol=1e-15, atol=0)
    torch.testing.assert_close(once / (1 - once), 6 * sigmas / (1 - sigmas), rtol=1e-14, atol=0)
    torch.testing.assert_close(noise_schedules.shift_sigmas(sigmas, shift=1.0), sigmas, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_edm_sigmas_are_those_of_diffusers(schedule, final):
    config = replace(EDM_SCHEDULE_PRESETS["edm"], sigma_schedule=schedule, final_sigmas_type=final)
    scheduler = EDMEulerScheduler(sigma_schedule=schedule, final_sigmas_type=final)
    for num_steps in (1, 2, 13):
        if schedule == "exponential" and num_steps == 1:
            continue  # theirs is then sigma_min, since they build it from that end
        scheduler.set_timesteps(num_steps)
        visited, told = noise_schedules.edm_sigmas(config, num_steps)
        # theirs of "exponential" are the exp of logarithms in float32
        np.testing.assert_allclose(scheduler.sigmas.double(), visited, rtol=(2 if schedule == "karras" else 16) * UNIT)
        np.testing.assert_allclose(scheduler.timesteps.double(), told, rtol=4 * UNIT, atol=8 * UNIT)


def test_jax_tables_are_those_of_torch_bit_for_bit():
    def tables(module):
        yield module.betas(SD)
        yield module.alphas_cumprod(SD)
        yield module.timesteps(SD, 13)
        yield module.previous_timesteps(SD, 13, constant_stride=True)
        yield from module.sigmas(replace(SD, sigma_schedule="karras"), 13)
        yield module.flow_training_sigmas(SD3)
        yield from module.flow_sigmas(FLUX, 13, mu=0.7)
        yield from module.edm_sigmas(EDMScheduleConfig(), 13)

    with jax.enable_x64(True):
        for ours, theirs in zip(tables(noise_schedules), tables(jax_noise_schedules), strict=True):
            np.testing.assert_array_equal(theirs, ours)
            assert theirs.dtype == str(ours.dtype).removeprefix("torch.")
    for ours, theirs in zip(tables(noise_schedules), tables(jax_noise_schedules), strict=True):
        rounded = ours.float() if ours.is_floating_point() else ours.int()
        np.testing.assert_array_equal(theirs, rounded)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda module: module.betas(SD3), TypeError, "config must be a DiffusionScheduleConfig, got FlowScheduleConfig"),
        (lambda module: module.timesteps(SD, 0), ValueError, r"num_steps must be in 1..num_train_timesteps=1000, got 0"),
        (lambda module: module.timesteps(SD, 1001), ValueError, r"num_steps must be in 1..num_train_timesteps=1000, got 1001"),
        (lambda module: module.timesteps(SD, 2.0), TypeError, "num_steps must be an integer, got 2.0"),
        (lambda module: module.flow_sigmas(FLUX, 4), ValueError, "mu must be given if and only if shifting is dynamic .*None"),
        (lambda module: module.flow_sigmas(SD3, 4, mu=1.0), ValueError, "mu must be given if and only if"),
        (lambda module: module.flow_sigmas(replace(SD3, shift_terminal=0.1), 1), ValueError, "num_steps must be above 1"),
        (lambda module: module.edm_sigmas(SD, 4), TypeError, "config must be a EDMScheduleConfig"),
        (lambda module: module.dynamic_mu(FLUX, 0), ValueError, "num_image_tokens must be in 1.."),
    ],
)
def test_a_bad_call_names_its_argument(call, error, message):
    for module in (noise_schedules, jax_noise_schedules):
        with pytest.raises(error, match=f"^{message}"):
            call(module)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DiffusionScheduleConfig, {"beta_schedule": "cosine"}, "beta_schedule must be 'linear' or"),
        (DiffusionScheduleConfig, {"prediction_type": "flow_prediction"}, "prediction_type must be epsilon, sample or"),
        (DiffusionScheduleConfig, {"beta_start": 0.5, "beta_end": 0.1}, "beta_start and beta_end must rise"),
        (DiffusionScheduleConfig, {"steps_offset": 1000}, "steps_offset must be in"),
        (DiffusionScheduleConfig, {"sigma_min": 0.0}, "sigma_min must be positive"),
        (DiffusionScheduleConfig, {"sample_max_value": 0.5}, "sample_max_value must be at least 1"),
        (DiffusionScheduleConfig, {"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio must be in"),
        (FlowScheduleConfig, {"shift": 0.0}, "shift must be positive"),
        (FlowScheduleConfig, {"shift_terminal": 1.0}, "shift_terminal must be in"),
        (FlowScheduleConfig, {"max_image_seq_len": 256}, "max_image_seq_len must be above"),
        (EDMScheduleConfig, {"sigma_schedule": "beta"}, "sigma_schedule must be 'karras' or 'exponential'"),
        (EDMScheduleConfig, {"prediction_type": "sample"}, "prediction_type must be 'epsilon' or 'v_prediction'"),
        (EDMScheduleConfig, {"sigma_max": 0.001}, "sigma_max must be above sigma_min"),
    ],
)
def test_a_bad_config_names_its_field(kind, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(**options)
