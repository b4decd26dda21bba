"""The image-diffusion training step: what it learns, its draws, its twin, its models, saving and resuming."""

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.reference.configs import DiTConfig, ImageDiffusionConfig
from gaugeblock.reference.jax import train_image_diffusion as jax_trainer
from gaugeblock.reference.jax import training as jax_training
from gaugeblock.reference.torch import dit, training
from gaugeblock.reference.torch import train_image_diffusion as trainer

MODEL = DiTConfig(
    input_size=4,
    in_channels=2,
    hidden_size=16,
    depth=1,
    num_heads=2,
    num_classes=3,
    learn_sigma=False,
    frequency_embedding_size=8,
)
CONFIG = ImageDiffusionConfig(MODEL, learning_rate=1e-2, weight_decay=0.1, label_dropout=0.3, accumulation_steps=2)
EPS = np.finfo(np.float64).eps
TRAININGS = {trainer: training, jax_trainer: jax_training}


def batch(size: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return float64 images, labels and example ids."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 2, 4, 4, generator=generator, dtype=torch.float64)
    return images, torch.arange(size) % 3, torch.randint(2**32, (size,), generator=generator)


def trained_state(config: ImageDiffusionConfig = CONFIG) -> dict[str, torch.Tensor]:
    """Return a state in float64 in the middle of a run, none of whose gradients is 0 by design."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, tensor in trainer.initial_state(config).items():
        normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name == "step":
            state[name] = torch.tensor(7)
        elif name.startswith("exp_avg_sq."):
            state[name] = 1e-3 * (0.5 + normal.square())
        else:
            state[name] = (0.03 if name.startswith("exp_avg.") else 0.2) * normal
    return state


def to_jax(tensors: dict[str, torch.Tensor]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(tensor.numpy()) for name, tensor in tensors.items()}


def assert_equal_to_rounding(actual: Any, expected: Any, units: int) -> None:
    """States of two runs differ by no more than so many roundings of their largest number, in each tensor."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        largest = np.abs(np.asarray(tensor)).max()
        assert np.abs(np.asarray(actual[name]) - np.asarray(tensor)).max() <= units * EPS * largest, name


def same_bits(actual: Any, expected: Any) -> bool:
    return set(actual) == set(expected) and all(
        one.dtype == other.dtype and one.tobytes() == other.tobytes()
        for one, other in ((np.asarray(actual[name]), np.asarray(expected[name])) for name in expected)
    )


def run(state: Any, batches: Any, config: ImageDiffusionConfig, module: ModuleType = trainer) -> Any:
    for each in batches:
        state, _ = module.train_step(state, *each, config=config)
    return state


def test_the_loss_falls():
    config = ImageDiffusionConfig(MODEL, learning_rate=1e-2, label_dropout=0.1)
    images, labels, ids = batch(32)
    images = images[labels].float()  # three pictures
    state, losses = trainer.initial_state(config), []
    for _ in range(60):
        state, metrics = trainer.train_step(state, images, labels, ids, config=config)
        losses.append(metrics.loss)
    assert losses[0] > 1.5  # the model starts at 0, the velocity's variance is that of noise and data together
    assert torch.stack(losses[-10:]).mean() < 0.5 * losses[0]


OTHER = {"velocity": "data - noise", "timestep_sampling": "logit-normal", "max_gradient_norm": 0.1, "accumulation_steps": 1}


def test_torch_and_jax_start_from_the_same_parameters():
    state, jax_state = training.part_of_state(trainer.initial_state(CONFIG), "model"), jax_trainer.initial_state(CONFIG)
    assert same_bits(jax_training.part_of_state(jax_state, "model"), state)
    assert jax_state["step"] == 0 and all((jax_state[f"exp_avg.{name}"] == 0).all() for name in state)


@pytest.mark.parametrize("changes", [{}, OTHER], ids=["usual", "other options"])
def test_torch_and_jax_make_the_same_steps(changes):
    config = replace(CONFIG, **changes)
    state, batches = trained_state(config), [batch(seed=seed) for seed in range(4)]
    with jax.enable_x64(True):
        jax_state = to_jax(state)
        for each in batches:
            jax_batch = [jnp.asarray(array.numpy()) for array in each]
            torch_draws = trainer.draws(each[0], each[2], int(state["step"]), config=config)
            jax_draws = jax_trainer.draws(jax_batch[0], jax_batch[2], jax_state["step"], config=config)
            state, metrics = trainer.train_step(state, *each, config=config)
            jax_state, jax_metrics = jax_trainer.train_step(jax_state, *jax_batch, config=config)
            for one, other in zip(jax_draws, torch_draws, strict=True):
                np.testing.assert_allclose(one, other, rtol=2 * EPS, atol=0)
            assert_equal_to_rounding(vars(jax_metrics), vars(metrics), units=64)
            assert_equal_to_rounding(jax_state, state, units=256)


def test_draws_differ_between_examples_steps_and_kinds_and_depend_on_nothing_else():
    images, ids = torch.zeros(400, 2, 4, 4), torch.arange(400)
    noise, times, is_dropped = trainer.draws(images, ids, 3, config=CONFIG)
    later_noise, later_times, later_dropped = trainer.draws(images, ids, 4, config=CONFIG)
    assert len(torch.cat([noise.flatten(), later_noise.flatten()]).unique()) > 0.99 * 2 * noise.numel()
    assert len(torch.cat([times, later_times]).unique()) == 800
    assert not is_dropped.equal(later_dropped)

    flags = torch.cat([is_dropped, later_dropped]).double()
    frequency, deviation = CONFIG.label_dropout, (CONFIG.label_dropout * (1 - CONFIG.label_dropout) / 800) ** 0.5
    assert abs(flags.mean() - frequency) < 5 * deviation
    assert abs(torch.corrcoef(torch.stack([flags, torch.cat([times, later_times]).double()]))[0, 1]) < 5 / 800**0.5
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5

    some = torch.tensor([17, 3, 3, 399])
    for drawn, expected in zip(trainer.draws(images[:4], some, 3, config=CONFIG), (noise, times, is_dropped), strict=True):
        assert drawn.equal(expected[some])


@pytest.mark.parametrize(("label_dropout", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_label_dropout_is_never_or_always_at_its_ends(label_dropout, share):
    config = replace(CONFIG, label_dropout=label_dropout)
    assert trainer.draws(torch.zeros(100, 2, 4, 4), torch.arange(100), 0, config=config)[2].double().mean() == share


def test_a_dropped_label_is_not_seen_by_the_model():
    config, (images, labels, ids) = replace(CONFIG, label_dropout=1.0), batch()
    state = trained_state()
    results = [trainer.train_step(state, images, each, ids, config=config)[0] for each in (labels, (labels + 1) % 3)]
    assert same_bits(*results)
    gradient = training.metrics_and_gradients(trainer.shares, state, (images, labels, None, None, ids), config=config)[1]
    table = gradient["y_embedder.embedding_table.weight"]
    assert (table[:3] == 0).all() and (table[3] != 0).all()


def test_times_lie_between_data_and_noise():
    ids = torch.arange(2000)
    for sampling, deviation in (("uniform", 12**-0.5), ("logit-normal", 0.208)):  # of the logit-normal distribution: numerically
        config = replace(CONFIG, timestep_sampling=sampling)
        times = trainer.draws(torch.zeros(2000, 1, 1, 1), ids, 0, config=config)[1]
        assert (times >= 0).all() and (times < 1).all()
        assert abs(times.mean() - 0.5) < 5 * deviation / 2000**0.5


@pytest.mark.parametrize("accumulation_steps", [2, 3, 5, 9])
def test_order_and_microbatches_do_not_matter(accumulation_steps):
    state, (images, labels, ids) = trained_state(), batch(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    config = replace(CONFIG, accumulation_steps=accumulation_steps)
    expected, metrics = trainer.train_step(state, images, labels, ids, config=replace(CONFIG, accumulation_steps=1))
    actual, other_metrics = trainer.train_step(state, images[order], labels[order], ids[order], config=config)
    assert_equal_to_rounding(actual, expected, units=64)
    assert_equal_to_rounding(vars(other_metrics), vars(metrics), units=64)


def test_the_loss_is_the_mean_of_the_examples_losses():
    state, (images, labels, ids) = trained_state(), batch(5)
    config = replace(CONFIG, accumulation_steps=3)
    model = functools.partial(dit.dit, training.part_of_state(state, "model"), config=MODEL)

    def losses_of(*batch):
        images, labels, ids = batch
        return trainer.example_losses(model, images, labels, None, None, ids, step=7, config=config)[0]

    losses = losses_of(images, labels, ids)
    _, metrics = trainer.train_step(state, images, labels, ids, config=config)
    torch.testing.assert_close(metrics.loss, losses.mean(), rtol=8 * EPS, atol=0)
    alone = [losses_of(images[i:][:1], labels[i:][:1], ids[i:][:1]) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), losses, rtol=64 * EPS, atol=0)


@pytest.mark.parametrize("saver", [trainer, jax_trainer], ids=["torch", "jax"])
@pytest.mark.parametrize("loader", [trainer, jax_trainer], ids=["torch", "jax"])
def test_a_saved_state_resumes_bit_for_bit_in_either_framework(saver, loader, tmp_path):
    batches = [batch(seed=seed) for seed in range(4)]
    with jax.enable_x64(True):
        arrays = {"torch": lambda each: each, "jax": lambda each: [jnp.asarray(array.numpy()) for array in each]}
        state = trained_state() if saver is trainer else to_jax(trained_state())
        prepare = arrays["torch" if saver is trainer else "jax"]
        half = run(state, map(prepare, batches[:2]), CONFIG, saver)
        TRAININGS[saver].save_state(half, tmp_path / "state.safetensors")
        loaded = TRAININGS[loader].load_state(tmp_path / "state.safetensors")
        assert same_bits(loaded, half)
        if loader is saver:
            through = run(state, map(prepare, batches), CONFIG, saver)
            assert same_bits(run(loaded, map(prepare, batches[2:]), CONFIG, saver), through)


@pytest.mark.parametrize("module", [trainer, jax_trainer], ids=["torch", "jax"])
def test_what_is_not_finite_raises_with_the_step_and_its_name_and_nothing_is_updated(module):
    with jax.enable_x64(True):
        state, (images, labels, ids) = trained_state(), batch()
        images[3, 1, 2, 0] = torch.nan
        arrays = [images, labels, ids]
        if module is jax_trainer:
            state, arrays = to_jax(state), [jnp.asarray(each.numpy()) for each in arrays]
        copy = {name: np.asarray(tensor).copy() for name, tensor in state.items()}
        with pytest.raises(FloatingPointError, match=r"^step 7: loss is not finite \(.*loss nan"):
            module.train_step(state, *arrays, config=CONFIG)
        assert all(np.array_equal(np.asarray(state[name]), copy[name]) for name in copy)


def test_a_step_in_float32_keeps_its_dtypes():
    state, (images, labels, ids) = trainer.initial_state(CONFIG), batch()
    new_state, metrics = trainer.train_step(state, images.float(), labels, ids, config=CONFIG)
    assert {name: tensor.dtype for name, tensor in new_state.items()} == {name: tensor.dtype for name, tensor in state.items()}
    assert metrics.loss.shape == metrics.gradient_norm.shape == () and metrics.loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_dropout": 1.5}, "label_dropout must be in"),
        ({"bias_portion": -0.5}, "bias_portion must be in"),
        ({"bias_multiplier": 0.0}, "bias_multiplier must be positive"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be positive"),
        ({"velocity": "up"}, "velocity must be"),
        ({"prediction_type": "v_prediction"}, "prediction_type must be 'flow_prediction' or 'epsilon' or 'sample', got"),
        ({"timestep_sampling": "late"}, "timestep_sampling must be"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"model": replace(MODEL, learn_sigma=True)}, "model.learn_sigma must be False"),
    ],
)
def test_a_bad_config_is_rejected_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)
