"""Samples of the trained digits: every sampler gives what the data are like, and JAX gives the same."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.reference.jax import dit as jax_dit
from gaugeblock.reference.jax import samplers as jax_samplers
from gaugeblock.reference.jax import unet as jax_unet
from gaugeblock.reference.torch import dit, samplers

DEMO = Path(__file__).parents[1] / "demo"
LABELS = torch.arange(10).repeat_interleave(8)


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(DEMO))
    try:
        import sample_digits

        yield sample_digits
    finally:
        sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def models(demo):
    return demo.load(DEMO / "digit_models.safetensors")


def test_samples_of_every_sampler_have_the_statistics_of_the_data(demo, models):
    import digits

    samples = demo.sample_all(models, LABELS)
    assert len(samples) == 10
    for name, images in samples.items():
        assert digits.accuracy(images, LABELS.numpy()) >= 0.95, name
        means, deviations = digits.distances(images, LABELS.numpy())
        assert means < 0.2 and deviations < 0.25, (
            f"{name}: {means}, {deviations}; images that know no digit are 0.37 and 0.35 off"
        )


def test_images_that_know_no_digit_do_not_have_them(demo):
    import digits

    real = digits.digits()[0][:, 0].numpy()
    means, deviations = digits.distances(real[np.random.default_rng(0).permutation(len(real))[: len(LABELS)]], LABELS.numpy())
    assert means > 0.3 or deviations > 0.3


@pytest.mark.parametrize("sampler", ["ddpm", "heun", "flow"])
def test_jax_samples_the_same_images(demo, models, sampler):
    labels, ids = torch.tensor([3, 8]), torch.arange(2)
    state = {name: each.double() for name, each in (models.dit if sampler == "flow" else models.unet).items()}
    noise = samplers.starting_noise(ids, shape=(4, 4, 4) if sampler == "flow" else (1, 8, 8), seed=5).double()
    of_torch = partial(dit.dit, state, class_labels=labels, config=demo.DIT) if sampler == "flow" else (
        lambda x, timesteps: demo.predict_noise(state, x, timesteps, labels)
    )  # fmt: skip
    how = {"num_steps": 5} if sampler == "heun" else {"example_ids": ids, "num_steps": 5, "seed": 5}
    config = demo.FlowScheduleConfig(stochastic_sampling=True) if sampler == "flow" else demo.SCHEDULE
    with torch.no_grad():
        expected = getattr(samplers, f"{sampler}_sample")(of_torch, noise, config=config, **how)

    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(each.numpy()) for name, each in state.items()}
        own = {name: each for name, each in arrays.items() if name != demo.TEXT}

        @jax.jit
        def of_jax(x, timesteps):
            if sampler == "flow":
                return jax_dit.dit(arrays, x, timesteps, jnp.asarray(labels.numpy()), config=demo.DIT)
            return jax_unet.unet(own, x, timesteps, arrays[demo.TEXT][labels.numpy(), None], config=demo.UNET)

        how |= {"example_ids": jnp.arange(2)} if "example_ids" in how else {}
        actual = getattr(jax_samplers, f"{sampler}_sample")(of_jax, jnp.asarray(noise.numpy()), config=config, **how)
    # float64 keeps 1e-16; five steps of a model of some hundred sums lose a few digits of it
    np.testing.assert_allclose(np.asarray(actual), expected.numpy(), rtol=0, atol=1e-9)
