"""Objectives and samplers: signs, ends of the path, twins, flows that are known."""

import itertools
import math
import re
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.reference.jax import objectives as jax_objectives
from gaugeblock.reference.jax import samplers as jax_samplers
from gaugeblock.reference.torch import objectives, samplers

SIGNS = {"noise - data": 1, "data - noise": -1}
EPS = np.finfo(np.float64).eps


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, 5, 2, 3, generator=generator, dtype=torch.float64)
    return data, noise


def test_the_path_leads_from_data_to_noise_with_the_velocity_of_that_sign():
    data, noise = pair()
    zeros, ones = torch.zeros(5), torch.ones(5)
    assert objectives.rectified_flow_interpolate(data, noise, zeros).equal(data)
    assert objectives.rectified_flow_interpolate(data, noise, ones).equal(noise)

    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    path, one = partial(objectives.rectified_flow_interpolate, data, noise), torch.ones_like(times)
    _, slope = torch.func.jvp(path, (times,), (one,))
    for velocity, sign in SIGNS.items():
        actual = objectives.rectified_flow_velocity(data, noise, velocity=velocity)
        torch.testing.assert_close(actual, sign * slope, rtol=0, atol=4 * EPS)


@pytest.mark.parametrize("velocity", SIGNS)
def test_the_loss_is_zero_for_the_right_velocity_alone_and_counts_each_example_by_itself(velocity):
    data, noise = pair()
    right = objectives.rectified_flow_velocity(data, noise, velocity=velocity)
    off = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0], dtype=torch.float64)
    loss = objectives.rectified_flow_loss(right + off[:, None, None], data, noise, velocity=velocity)
    torch.testing.assert_close(loss, off**2, rtol=8 * EPS, atol=0)
    other = next(each for each in SIGNS if each != velocity)
    assert (objectives.rectified_flow_loss(right, data, noise, velocity=other) > 0.1).all()


def test_low_precision_is_rounded_once():
    data, noise = (each.bfloat16() for each in pair())
    times = torch.rand(5, generator=torch.Generator().manual_seed(1))
    exact = objectives.rectified_flow_interpolate(data.double(), noise.double(), times)
    assert objectives.rectified_flow_interpolate(data, noise, times).equal(exact.bfloat16())
    assert objectives.rectified_flow_loss(data, data, noise, velocity="noise - data").dtype == torch.float32


@pytest.mark.parametrize("velocity", SIGNS)
def test_jax_objectives_are_those_of_torch(velocity):
    data, noise = pair()
    times = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def results(module: ModuleType, data, noise, times) -> list:
        loss = module.rectified_flow_loss(data * times[0], data, noise, velocity=velocity)
        path = module.rectified_flow_interpolate(data, noise, times)
        return [path, module.rectified_flow_velocity(data, noise, velocity=velocity), loss]

    with jax.enable_x64(True):
        jax_results = results(jax_objectives, *(jnp.asarray(each.numpy()) for each in (data, noise, times)))
    for actual, expected in zip(jax_results, results(objectives, data, noise, times), strict=True):
        assert actual.dtype == np.float64
        # the frameworks add up in other orders: of sums this short some roundings, where a wrong term is off by all of itself
        np.testing.assert_allclose(actual, expected, rtol=16 * EPS, atol=4 * EPS)


# Where all data lie at one point, the velocity at (x, t) is (x - point) / t, and every path is straight: one step is exact.
POINTS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 4.0, -3.0], [1.0, 1.0, 1.0]], dtype=torch.float64)  # the last: no label


def sampled(module: ModuleType, points, noise, labels, *, velocity: str, **options):
    def model(x, timesteps, labels):
        return SIGNS[velocity] * (x - points[labels]) / (timesteps[:, None] / 1000)

    return module.euler_sample(model, noise, labels, null_label=2, velocity=velocity, **options)


@pytest.mark.parametrize("velocity", SIGNS)
@pytest.mark.parametrize("num_steps", [1, 7])
def test_euler_sampling_follows_a_known_flow_from_noise_to_data(velocity, num_steps):
    labels = torch.tensor([1, 0, 1, 0])
    noise = samplers.starting_noise(torch.arange(4), shape=(3,), seed=5).double()
    data = sampled(samplers, POINTS, noise, labels, velocity=velocity, num_steps=num_steps, guidance_scale=1.0)
    torch.testing.assert_close(data, POINTS[labels], rtol=0, atol=64 * EPS)


def test_guidance_goes_from_no_label_through_the_label_and_beyond():
    labels = torch.tensor([0, 1, 1])
    noise = samplers.starting_noise(torch.arange(3), shape=(3,), seed=5).double()
    for guidance_scale in (0.0, 1.0, 2.5):
        data = sampled(samplers, POINTS, noise, labels, velocity="noise - data", num_steps=3, guidance_scale=guidance_scale)
        expected = POINTS[2] + guidance_scale * (POINTS[labels] - POINTS[2])
        torch.testing.assert_close(data, expected, rtol=0, atol=64 * EPS)


def test_the_error_of_euler_sampling_is_of_first_order_in_the_flow_of_gaussian_data():
    """With data of deviation s, x(t) = x(1) * sqrt((1 - t)**2 s**2 + t**2)."""
    s = 0.5

    def model(x, timesteps, labels):
        t = timesteps[:, None] / 1000
        return x * (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)

    noise = samplers.starting_noise(torch.arange(6), shape=(3,), seed=1).double()
    errors = []
    for num_steps in (50, 100, 200):
        data = samplers.euler_sample(
            model, noise, torch.zeros(6).long(), null_label=0, guidance_scale=1.0, num_steps=num_steps, velocity="noise - data"
        )
        errors.append((data - s * noise).abs().max())
    orders = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert [round(order) for order in orders] == [1, 1]


@pytest.mark.parametrize("velocity", SIGNS)
def test_jax_sampling_is_that_of_torch(velocity):
    options = {"velocity": velocity, "num_steps": 5, "guidance_scale": 3.0}
    labels, ids = torch.tensor([0, 1, 1]), torch.tensor([4, 0, 2**32 - 1])
    noise = samplers.starting_noise(ids, shape=(3,), seed=5)
    with jax.enable_x64(True):
        jax_noise = jax_samplers.starting_noise(jnp.asarray(ids.numpy()), shape=(3,), seed=5)
        np.testing.assert_array_equal(jax_noise, noise)
        points, jax_labels = jnp.asarray(POINTS.numpy()), jnp.asarray(labels.numpy())
        actual = sampled(jax_samplers, points, jax_noise.astype(float), jax_labels, **options)
    expected = sampled(samplers, POINTS, noise.double(), labels, **options)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=256 * EPS)


@pytest.mark.parametrize(
    ("function", "bad", "error", "message"),
    [
        ("rectified_flow_interpolate", {"data": torch.zeros(5).int()}, TypeError, "data must be .*, got int32"),
        ("rectified_flow_interpolate", {"data": torch.zeros(5)}, ValueError, r"data must be \[batch_size, ...\], got (5,)"),
        ("rectified_flow_interpolate", {"noise": torch.zeros(5, 3)}, ValueError, "noise must be of the shape of data"),
        ("rectified_flow_interpolate", {"times": torch.zeros(4)}, ValueError, r"times must be \[batch_size=5\], got (4,)"),
        ("rectified_flow_velocity", {"velocity": "up"}, ValueError, "velocity must be 'noise - data' or 'data - noise'"),
        ("rectified_flow_loss", {"prediction": torch.zeros(5, 3)}, ValueError, "prediction must be of the shape of data"),
        ("euler_sample", {"noise": torch.zeros(5, 2).half()}, TypeError, "noise must be float32 or float64, got float16"),
        ("euler_sample", {"labels": torch.zeros(5)}, TypeError, "labels must be .*, got float32"),
        ("euler_sample", {"labels": torch.zeros(4).long()}, ValueError, r"labels must be \[batch_size=5\], got (4,)"),
        ("euler_sample", {"num_steps": 0}, ValueError, "num_steps must be in 1.."),
        ("euler_sample", {"velocity": "up"}, ValueError, "velocity must be "),
    ],
)
def test_a_bad_call_names_its_argument(function, bad, error, message):
    data, noise = pair()
    calls = {
        "rectified_flow_interpolate": {"data": data, "noise": noise, "times": torch.zeros(5)},
        "rectified_flow_velocity": {"data": data, "noise": noise, "velocity": "noise - data"},
        "rectified_flow_loss": {"prediction": data, "data": data, "noise": noise, "velocity": "noise - data"},
        "euler_sample": {
            "model": None,
            "noise": noise,
            "labels": torch.zeros(5).long(),
            "null_label": 0,
            "guidance_scale": 1.0,
            "num_steps": 1,
            "velocity": "noise - data",
        },
    }
    modules = (samplers, jax_samplers) if function == "euler_sample" else (objectives, jax_objectives)
    call = calls[function] | bad
    with jax.enable_x64(True):
        jax_call = {name: jnp.asarray(each.numpy()) if isinstance(each, torch.Tensor) else each for name, each in call.items()}
        pattern = "^" + message.replace("(", re.escape("(")).replace(")", re.escape(")"))
        for module, arguments in zip(modules, (call, jax_call), strict=True):
            with pytest.raises(error, match=pattern):
                getattr(module, function)(**arguments)
