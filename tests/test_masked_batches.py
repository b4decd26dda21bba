"""What block diffusion steps mask: times, weights and tokens, by hand, over many draws, and alike in PyTorch and JAX."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from text_models import batch_of, config_of
from trained_models import draws, to_jax

from gaugeblock.reference.jax import train_block_diffusion as jax_trainer
from gaugeblock.reference.torch import train_block_diffusion as trainer

EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0, 4.0, 0, 2.0, 0, 0, 0]),
        ({"weighting": "none"}, [0, 0, 1.0, 0, 1.0, 0, 0, 0]),
        ({"weighting": "linear"}, [0, 0, 0.75, 0, 0.5, 0, 0, 0]),
        # seen: 0, 1 and 3 at distances 2, 1, 1; 0, 1 and 3 at 4, 3, 1: tokens of the other sample do not count
        ({"weighting": "cart"}, [0, 0, 0.05 * (0.9 + 2), 0, 0.05 * (0.729 + 0.81 + 1), 0, 0, 0]),
        ({"weighting": "cart", "cart_p": 0.5}, [0, 0, 0.25 * 2.5, 0, 0.25 * 1.375, 0, 0, 0]),
    ],
)
def test_weights_by_hand(options, expected):
    shares = torch.tensor([[1.0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.125, 0.5]], dtype=torch.float64)
    is_masked = torch.tensor([[False, False, True, False, True, False, False, False]])
    samples = torch.tensor([[1, 1, 1, 1, 1, 0, 0, -1]])
    config = config_of("sdar", **options)
    expected = torch.tensor([expected], dtype=torch.float64)
    torch.testing.assert_close(trainer.weights(shares, is_masked, samples, config=config), expected, rtol=4 * EPS, atol=0)
    with jax.enable_x64(True):
        actual = jax_trainer.weights(*to_jax((shares, is_masked, samples)), config=config)
        np.testing.assert_allclose(actual, expected, rtol=4 * EPS, atol=0)


@pytest.mark.parametrize(
    ("times_of", "expected"),
    [
        ("sequence", [0] * 9 + [9, 9]),
        ("sample", [0] * 5 + [5] * 4 + [9, 9]),
        ("block", [0] * 3 + [3] * 2 + [5] * 3 + [8] + [9, 9]),
    ],
)
def test_what_has_a_time_of_its_own_by_hand(times_of, expected):
    samples = torch.tensor([[0] * 5 + [4] * 4 + [-1] * 2, [-1] * 2 + [0] * 9])
    config = config_of("sdar", times_of=times_of)
    found = [trainer.first_places(samples, config=config), jax_trainer.first_places(to_jax(samples), config=config)]
    for first in found:
        assert first[0].tolist() == expected
        assert first[1, 2:].tolist() == [2] * 9 if times_of != "block" else [2] * 3 + [5] * 3 + [8] * 3

    shares, _ = trainer.draws(samples, torch.tensor([4, 4]), 3, config=replace(config, least_share=0.0))
    values = [row.unique_consecutive() for row in shares]
    assert len(values[0]) == len(set(expected)) and len(shares[0].unique()) == len(values[0])
    spread, _ = trainer.draws(samples, torch.tensor([4, 9]), 3, config=replace(config, least_share=0.0, antithetic=True))
    for row, is_real in zip(spread, samples >= 0, strict=True):
        times = row[is_real].unique_consecutive().double()
        steps = (times.diff() % 1 - 1 / len(times)).abs()
        assert (steps < 1e-6).all() and times[0] not in (0, 0.5)  # one turn, in steps of one size


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("times_of", ["sequence", "sample", "block"])
def test_a_loss_that_ignores_its_input_is_on_average_that_of_all_tokens(times_of, antithetic):
    config = config_of("sdar", times_of=times_of, antithetic=antithetic)
    ids, labels, samples, _ = batch_of()
    num_draws = 4000
    row_of_draw = torch.arange(num_draws) % 3
    of_draw = (each[row_of_draw] for each in (ids, labels, samples))
    _, weights, number = trainer.masked_batch(*of_draw, torch.arange(num_draws), 0, dtype=torch.float64, config=config)
    has_label = ((labels != -100) & (samples >= 0))[row_of_draw]
    assert int(number) == int(has_label.sum())
    logits = draws(20, seed=3)
    losses = (torch.logsumexp(logits, 0) - logits)[labels.clamp(min=0)][row_of_draw]
    shared = losses * has_label
    far = ((weights * losses).sum(1) - shared.sum(1)) / has_label.sum(1)
    assert abs(far.mean()) < 5 * far.std() / num_draws**0.5 and far.std() / num_draws**0.5 < 0.1
    each_place = (weights.sum(0) / has_label.sum(0) - 1)[4:]
    assert abs(each_place).max() < 5 * (math.log(1000) / 2000) ** 0.5  # the variance of 1 / p is ln(1000) - 1


def test_a_share_of_tokens_is_masked_of_those_that_have_labels():
    config = config_of("clipped", times_of="sample")
    count = 3000
    ids, samples = torch.zeros(count, 16, dtype=torch.int64), torch.zeros(count, 16, dtype=torch.int64)
    shares, is_drawn = trainer.draws(samples, torch.arange(count), 2, config=config)
    assert 0.55 <= shares.min() < 0.552 and 0.948 < shares.max() <= 0.95
    assert abs(shares.double().mean() - 0.75) < 5 * (0.4**2 / 12 / count) ** 0.5
    assert abs((is_drawn.double() - shares).mean()) < 5 * 0.43 / (16 * count) ** 0.5
    # nothing else decides which: neighbours, places, times
    kinds = torch.stack([shares[:, 0], *(is_drawn.double() - shares).T]).double()
    assert abs(torch.corrcoef(kinds) - torch.eye(17)).max() < 6 / count**0.5
    labels = torch.where(torch.arange(16) % 3 == 0, -100, ids)
    noisy, weights, _ = trainer.masked_batch(
        ids, labels, samples.masked_fill(torch.arange(16) > 11, -1), torch.arange(count), 2, dtype=torch.float64, config=config
    )
    allowed = (torch.arange(16) % 3 != 0) & (torch.arange(16) < 12)
    assert torch.equal(noisy == 19, is_drawn & allowed) and torch.equal(noisy == 19, weights > 0)


def test_draws_are_of_example_and_step_and_of_nothing_else():
    config, (ids, labels, samples, examples) = config_of("bd3-lm"), batch_of()
    whole = trainer.draws(samples, examples, 3, config=config)
    some = torch.tensor([4, 1, 1])
    for drawn, each in zip(trainer.draws(samples[some], examples[some], 3, config=config), whole, strict=True):
        assert drawn.equal(each[some])
    for changed in (trainer.draws(samples, examples, 4, config=config), trainer.draws(samples, examples + 1, 3, config=config)):
        assert not changed[0].equal(whole[0]) and not changed[1].equal(whole[1])
    other, _ = trainer.draws(samples, examples, 3, config=replace(config, seed=6))
    assert not other.equal(whole[0])
    # nor of what is learned of them: tokens and labels
    narrow = trainer.masked_batch(ids * 0, labels, samples, examples, 3, dtype=torch.float32, config=config)[0] == 19
    assert narrow.equal(trainer.masked_batch(ids, labels, samples, examples, 3, dtype=torch.float64, config=config)[0] == 19)


def test_torch_and_jax_mask_the_same_tokens():
    ids = torch.zeros(64, 512, dtype=torch.int64)
    for kind in ("sdar", "bd3-lm", "clipped"):
        config = config_of(kind)
        ours = trainer.masked_batch(ids, ids, ids, torch.arange(64), 7, dtype=torch.float32, config=config)
        arrays = to_jax((ids, ids, ids, torch.arange(64)))
        theirs = jax_trainer.masked_batch(*arrays, 7, dtype=jnp.float32, config=config)
        np.testing.assert_array_equal(theirs[0], ours[0])
        np.testing.assert_allclose(theirs[1], ours[1], rtol=2.0**-22)  # a time, and 1 / it: a rounding each, in each framework
        assert int(theirs[2]) == int(ours[2]) == ids.numel()
