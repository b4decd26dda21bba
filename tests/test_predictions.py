"""Predictions, weights of losses, timesteps of training: inverses, limits, known numbers, diffusers, twins."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, compute_snr

from gaugeblock.reference import noise_tables
from gaugeblock.reference.configs import DIFFUSION_SCHEDULE_PRESETS
from gaugeblock.reference.jax import noise_schedules as jax_noise_schedules
from gaugeblock.reference.jax import objectives as jax_objectives
from gaugeblock.reference.jax import predictions as jax_predictions
from gaugeblock.reference.jax import timestep_sampling as jax_timestep_sampling
from gaugeblock.reference.torch import noise_schedules, objectives, predictions, timestep_sampling

SD = DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-1"]
TABLE = noise_schedules.alphas_cumprod(SD)
KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")
EPS = np.finfo(np.float64).eps
RATES = {  # alphas and sigmas: variance preserving, flow, noise added
    "variance preserving": (ALPHAS := torch.tensor([0.99, 0.8, 0.6, 0.02]).double(), (1 - ALPHAS**2).sqrt()),
    "flow": (torch.tensor([0.9, 0.5, 0.25, 0.01]).double(), 1 - torch.tensor([0.9, 0.5, 0.25, 0.01]).double()),
    "noise added": (torch.ones(4).double(), torch.tensor([0.002, 0.5, 3.0, 80.0]).double()),
}  # fmt: skip


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize(("kind", "to"), [*itertools.product(KINDS, KINDS)])
def test_every_prediction_becomes_every_other(rates, kind, to):
    (data, noise), (alphas, sigmas) = pair(), RATES[rates]
    noised = predictions.add_noise(data, noise, alphas, sigmas)
    said = predictions.prediction_target(data, noise, alphas, sigmas, prediction_type=kind)
    expected = predictions.prediction_target(data, noise, alphas, sigmas, prediction_type=to)
    actual = predictions.convert_prediction(said, noised, alphas, sigmas, prediction_type=kind, to=to)
    # of data from noise, alpha divides what rounding leaves: 0.01; of noise from data, sigma: 0.002
    torch.testing.assert_close(actual, expected, rtol=0, atol=100 * 32 * EPS * 80)
    back = predictions.convert_prediction(actual, noised, alphas, sigmas, prediction_type=to, to=kind)
    torch.testing.assert_close(back, said, rtol=0, atol=1e-9)


def test_known_kinds_are_what_the_table_says():
    (data, noise), (alphas, sigmas) = pair(), RATES["variance preserving"]
    a, s = alphas[:, None, None], sigmas[:, None, None]
    targets = {"epsilon": noise, "sample": data, "v_prediction": a * noise - s * data, "flow_prediction": noise - data}
    for kind, expected in targets.items():
        actual = predictions.prediction_target(data, noise, alphas, sigmas, prediction_type=kind)
        torch.testing.assert_close(actual, expected, rtol=0, atol=8 * EPS)
    flow = predictions.prediction_target(data, noise, alphas, sigmas, prediction_type="flow_prediction")
    assert flow.equal(objectives.rectified_flow_velocity(data, noise, velocity="noise - data"))
    times = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    line = objectives.rectified_flow_interpolate(data, noise, times)
    assert predictions.add_noise(data, noise, 1 - times, times).equal(line)


def test_at_the_ends_what_is_known_is_exact_and_the_rest_is_refused():
    data, noise = pair()
    ends = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    noised = predictions.add_noise(data, noise, ends, 1 - ends)
    assert noised[:2].equal(data[:2]) and noised[2:].equal(noise[2:])
    for kind in ("v_prediction", "flow_prediction"):
        said = predictions.prediction_target(data, noise, ends, 1 - ends, prediction_type=kind)
        for to in KINDS:
            expected = predictions.prediction_target(data, noise, ends, 1 - ends, prediction_type=to)
            actual = predictions.convert_prediction(said, noised, ends, 1 - ends, prediction_type=kind, to=to)
            torch.testing.assert_close(actual, expected, rtol=0, atol=8 * EPS)
    for kind, name in (("epsilon", "alphas"), ("sample", "sigmas")):
        for to in set(KINDS) - {kind}:
            with pytest.raises(ValueError, match=rf"^{name} must be in \(0, inf\), got 0.0..1.0"):
                predictions.convert_prediction(noise, noised, ends, 1 - ends, prediction_type=kind, to=to)
        assert predictions.convert_prediction(noise, noised, ends, 1 - ends, prediction_type=kind, to=kind) is noise


def test_noise_and_velocity_are_those_of_diffusers():
    scheduler = DDPMScheduler(beta_start=SD.beta_start, beta_end=SD.beta_end, beta_schedule=SD.beta_schedule)
    scheduler.alphas_cumprod = TABLE
    timesteps, (data, noise) = torch.tensor([0, 250, 999, 7]), pair()
    alphas, sigmas = noise_schedules.signal_and_noise(TABLE[timesteps])
    torch.testing.assert_close(
        predictions.add_noise(data, noise, alphas, sigmas), scheduler.add_noise(data, noise, timesteps), rtol=0, atol=4 * EPS
    )
    velocity = predictions.prediction_target(data, noise, alphas, sigmas, prediction_type="v_prediction")
    torch.testing.assert_close(velocity, scheduler.get_velocity(data, noise, timesteps), rtol=0, atol=4 * EPS)
    theirs = compute_snr(scheduler, timesteps).double()  # which is float32: 1 - alpha**2 loses three digits at timestep 0
    torch.testing.assert_close(noise_schedules.signal_to_noise(TABLE[timesteps]), theirs, rtol=2.0**-23 / 0.00085, atol=0)


def test_min_snr_weights_have_known_numbers():
    snr = noise_schedules.signal_to_noise(TABLE[[0, 250, 500]])
    known = {
        "epsilon": [0.004253724, 1, 1],
        "v_prediction": [0.004250109, 0.6737923, 0.2763325],
        "sample": [5, 2.065532, 0.3818501],
    }
    np.testing.assert_allclose(snr, [1175.441, 2.065532, 0.3818501], rtol=1.2e-4)  # of a table in float32
    for kind, expected in known.items():
        actual = predictions.min_snr_weights(snr, prediction_type=kind, gamma=5.0)
        np.testing.assert_allclose(actual, expected, rtol=1.2e-4)


def test_min_snr_weights_weigh_the_same_errors_of_the_data():
    """A prediction off by d means data off by as much as its kind says, and the loss is one and the same."""
    for name, (alphas, sigmas) in RATES.items():
        snr = (alphas / sigmas) ** 2
        of_data = predictions.min_snr_weights(snr, prediction_type="sample", gamma=5.0)
        assert of_data.tolist() == [min(each, 5.0) for each in snr.tolist()]
        fits = {"epsilon": True, "v_prediction": name == "variance preserving", "flow_prediction": name == "flow"}
        for kind in (each for each, fit in fits.items() if fit):
            zeros, off = torch.zeros(4, 1, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64)
            data_off = predictions.convert_prediction(off, zeros, alphas, sigmas, prediction_type=kind, to="sample")
            weights = predictions.min_snr_weights(snr, prediction_type=kind, gamma=5.0)
            torch.testing.assert_close(weights, of_data * data_off[:, 0] ** 2, rtol=1e-13, atol=0)


def test_min_snr_weights_are_finite_at_both_ends():
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    known = {"epsilon": [1, 0], "sample": [0, 5], "v_prediction": [0, 0], "flow_prediction": [0, 0]}
    for kind, expected in known.items():
        assert predictions.min_snr_weights(ends, prediction_type=kind, gamma=5.0).tolist() == expected


def test_weights_of_flows_have_known_numbers():
    times = 1 - torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    how = {"prediction_type": "flow_prediction", "gamma": 5.0}
    as_coded = objectives.rectified_flow_min_snr_weights(times, **how, snr="noise over data")
    np.testing.assert_allclose(as_coded, [5e-16, 0.5555556, 1, 1], rtol=1e-7)
    consistent = objectives.rectified_flow_min_snr_weights(times, **how)
    np.testing.assert_allclose(consistent, [0, 0.0625, 0.25, 0.3125], rtol=1e-15)
    cosmap = objectives.rectified_flow_weights(torch.tensor([0.1]).double(), weighting="cosmap")
    assert cosmap.item() == pytest.approx(0.7763655, rel=1e-6)
    for kind in KINDS:
        for snr in ("data over noise", "noise over data"):
            ends = torch.tensor([0.0, 1.0])
            assert objectives.rectified_flow_min_snr_weights(ends, prediction_type=kind, gamma=5.0, snr=snr).isfinite().all()
    with pytest.raises(ValueError, match=r"^times must be in \(0, 1\]"):
        objectives.rectified_flow_weights(torch.zeros(2), weighting="sigma_sqrt")


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_of_flows_are_those_of_diffusers(weighting):
    times = torch.linspace(0.01, 1, 7, dtype=torch.float64)
    expected = compute_loss_weighting_for_sd3(weighting, times).double()  # sigma_sqrt is cast to float32
    actual = objectives.rectified_flow_weights(times, weighting=weighting)
    torch.testing.assert_close(actual, expected, rtol=2.0**-24 if weighting == "sigma_sqrt" else 1e-14, atol=0)


def test_times_are_those_of_diffusers(monkeypatch):
    draws = torch.linspace(0, 0.999, 9, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: draws)
    theirs = compute_density_for_timestep_sampling("mode", 9, mode_scale=1.29)
    torch.testing.assert_close(timestep_sampling.mode_times(draws), theirs, rtol=0, atol=4 * EPS)
    monkeypatch.setattr(torch, "normal", lambda *shape, **how: 0.3 + 1.7 * draws)
    theirs = compute_density_for_timestep_sampling("logit_normal", 9, logit_mean=0.3, logit_std=1.7)
    torch.testing.assert_close(timestep_sampling.logit_normal_times(draws, mean=0.3, std=1.7), theirs, rtol=0, atol=4 * EPS)


def test_times_have_known_quantiles():
    normals = torch.special.ndtri(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
    known = [0.161806, 0.337492, 0.5, 0.662508, 0.838194]
    np.testing.assert_allclose(timestep_sampling.logit_normal_times(normals), known, atol=1e-6)
    assert timestep_sampling.mode_times(torch.tensor([0.25]).double()).item() == pytest.approx(0.6164162, rel=1e-6)


def test_the_last_time_has_a_place_in_the_table():
    times = timestep_sampling.mode_times(torch.tensor([0.0, 0.25, 1.0]).double())
    assert times[0] == 1
    indices = timestep_sampling.timestep_indices(times, num_timesteps=1000)
    assert indices.tolist() == [999, 616, 0] and indices.dtype == torch.int64


@pytest.mark.parametrize(
    ("bias", "biased"),
    [
        ({"bias": "none"}, range(0)),
        ({"bias": "earlier", "portion": 0.3}, range(3)),
        ({"bias": "later", "portion": 0.3}, range(7, 10)),
        ({"bias": "later", "portion": 0.05}, range(0)),
        ({"bias": "earlier", "portion": 0.0}, range(0)),
        ({"bias": "range", "begin": 2, "end": 5}, range(2, 5)),
    ],
)
def test_biased_timesteps_are_drawn_as_often_as_asked_for(bias, biased):
    multiplier = 3.0
    draws = (torch.arange(30000) + 0.5).double() / 30000
    drawn = timestep_sampling.biased_timesteps(draws, num_timesteps=10, multiplier=multiplier, **bias)
    weights = torch.tensor([multiplier if n in biased else 1.0 for n in range(10)])
    expected = 30000 * weights / weights.sum()
    assert ((drawn.bincount(minlength=10) - expected).abs() <= 1).all()
    assert timestep_sampling.biased_timesteps(torch.ones(1), num_timesteps=10, **bias).tolist() == [9]


def results(module_of, arrays):
    draws, snr, data, noise = arrays
    predicting, aims, sampling, schedules = module_of
    alphas, sigmas = schedules.signal_and_noise(draws)
    yield from (alphas, sigmas, schedules.signal_to_noise(draws), schedules.shift_sigmas(draws, shift=3.0))
    noised = predicting.add_noise(data, noise, alphas, sigmas)
    yield noised
    for kind, to in itertools.product(KINDS, KINDS):
        yield predicting.convert_prediction(noise, noised, alphas, sigmas, prediction_type=kind, to=to)
    for kind in KINDS:
        yield predicting.prediction_target(data, noise, alphas, sigmas, prediction_type=kind)
        yield predicting.min_snr_weights(snr, prediction_type=kind, gamma=5.0)
        for ratio in ("data over noise", "noise over data"):
            yield aims.rectified_flow_min_snr_weights(draws, prediction_type=kind, gamma=5.0, snr=ratio)
    for weighting in ("none", "sigma_sqrt", "cosmap"):
        yield aims.rectified_flow_weights(draws, weighting=weighting)
    yield from (sampling.logit_normal_times(snr, mean=0.1, std=2.0), sampling.mode_times(draws, scale=-0.5))
    yield sampling.timestep_indices(draws, num_timesteps=7)
    for bias in ("none", "earlier", "later", "range"):
        yield sampling.biased_timesteps(draws, num_timesteps=30, bias=bias, multiplier=1 / 3, begin=3, end=9)


def test_jax_has_the_same_numbers():
    arrays = torch.tensor([0.3, 0.01, 0.999, 0.5]).double(), torch.tensor([0.0, 3.0, 7.0, 1e4]).double(), *pair()
    ours = results((predictions, objectives, timestep_sampling, noise_schedules), arrays)
    with jax.enable_x64(True):
        modules = jax_predictions, jax_objectives, jax_timestep_sampling, jax_noise_schedules
        theirs = [np.asarray(each) for each in results(modules, [jnp.asarray(each.numpy()) for each in arrays])]
    for actual, expected in zip(theirs, ours, strict=True):
        assert str(actual.dtype) == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_allclose(actual, expected, rtol=64 * EPS, atol=64 * EPS)


def test_low_precision_is_rounded_once():
    data, noise = (each.bfloat16() for each in pair())
    alphas, sigmas = (each.float() for each in RATES["variance preserving"])
    exact = predictions.add_noise(data.double(), noise.double(), alphas, sigmas)
    once = predictions.add_noise(data, noise, alphas, sigmas)
    assert ((once.double() - exact).abs() <= 2.0**-8 / (1 + 2.0**-8) * exact.abs() + 2.0**-22).all()
    half = predictions.prediction_target(data, noise, alphas, sigmas, prediction_type="v_prediction")
    assert half.dtype == torch.bfloat16


def test_an_empty_batch_is_an_ordinary_one():
    nothing, none = torch.zeros(0, 2, 3), torch.zeros(0)
    assert predictions.add_noise(nothing, nothing, none, none).shape == nothing.shape
    said = predictions.convert_prediction(nothing, nothing, none, none, prediction_type="epsilon", to="sample")
    assert said.shape == nothing.shape
    assert timestep_sampling.biased_timesteps(none, num_timesteps=10, bias="none").shape == (0,)


ONES, IMAGES = torch.ones(3), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m[0].add_noise(m[4](IMAGES.int()), m[4](IMAGES), m[4](ONES), m[4](ONES)), TypeError, "data must be"),
        (
            lambda m: m[0].add_noise(m[4](IMAGES), m[4](IMAGES[:2]), m[4](ONES), m[4](ONES)),
            ValueError,
            "noise must be of the shape",
        ),
        (lambda m: m[0].add_noise(m[4](IMAGES), m[4](IMAGES), m[4](-ONES), m[4](ONES)), ValueError, "alphas must be in"),
        (lambda m: m[0].add_noise(m[4](IMAGES), m[4](IMAGES), m[4](ONES), m[4](ONES[:2])), ValueError, "sigmas must be"),
        (lambda m: m[0].min_snr_weights(m[4](-ONES), prediction_type="sample", gamma=5.0), ValueError, "snr must be in"),
        (lambda m: m[0].min_snr_weights(m[4](ONES), prediction_type="x0", gamma=5.0), ValueError, "prediction_type must be"),
        (lambda m: m[0].min_snr_weights(m[4](ONES), prediction_type="sample", gamma=-1.0), ValueError, "gamma must be positive"),
        (lambda m: m[1].rectified_flow_weights(m[4](2 * ONES), weighting="none"), ValueError, "times must be in"),
        (lambda m: m[1].rectified_flow_weights(m[4](ONES), weighting="cos"), ValueError, "weighting must be"),
        (lambda m: m[2].mode_times(m[4](ONES), scale=2.0), ValueError, "scale must be in"),
        (lambda m: m[2].logit_normal_times(m[4](ONES), std=0.0), ValueError, "std must be positive"),
        (lambda m: m[2].timestep_indices(m[4](ONES), num_timesteps=0), ValueError, "num_timesteps must be in"),
        (lambda m: m[2].biased_timesteps(m[4](ONES), num_timesteps=10, bias="range"), ValueError, "end must be in"),
        (lambda m: m[2].biased_timesteps(m[4](ONES), num_timesteps=10, bias="late"), ValueError, "bias must be"),
        (lambda m: m[3].signal_and_noise(m[4](2 * ONES)), ValueError, "alphas_cumprod must be in"),
        (lambda m: m[3].shift_sigmas(m[4](ONES), shift=0.0), ValueError, "shift must be positive"),
    ],
)
def test_a_bad_call_names_its_argument(call, error, message):
    for modules in (
        (predictions, objectives, timestep_sampling, noise_schedules, lambda each: each),
        (jax_predictions, jax_objectives, jax_timestep_sampling, jax_noise_schedules, lambda each: jnp.asarray(each.numpy())),
    ):
        with pytest.raises(error, match=f"^{message}"):
            call(modules)


def test_the_table_of_sums_ends_with_all_weights():
    assert noise_tables.timestep_sums("later", 4, 3.0, 0.5, 0, 4) == [1, 2, 5, 8]
