"""In which order a run takes its examples: every one once in a pass, in any order, known from the step alone."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from gaugeblock.reference.jax import data_order as jax_order
from gaugeblock.reference.torch import data_order


def ids_of(steps: int, **sizes) -> list[int]:
    return torch.cat([data_order.batch_ids(step, **sizes) for step in range(steps)]).tolist()


@pytest.mark.parametrize(("num_examples", "batch_size"), [(1, 3), (2, 1), (7, 3), (16, 16), (17, 5), (100, 64)])
def test_a_pass_takes_every_example_once_also_where_batches_end_elsewhere(num_examples, batch_size):
    ids = ids_of(-(-6 * num_examples // batch_size), batch_size=batch_size, num_examples=num_examples, seed=3)
    passes = [ids[start : start + num_examples] for start in range(0, 6 * num_examples, num_examples)]
    assert all(sorted(each) == list(range(num_examples)) for each in passes)
    assert len(set(map(tuple, passes))) > 4 or num_examples < 7


def test_batches_of_other_sizes_are_of_the_same_order():
    sizes = {"num_examples": 23, "seed": 2**40 + 5}
    assert ids_of(12, batch_size=4, **sizes) == ids_of(6, batch_size=8, **sizes) == ids_of(1, batch_size=48, **sizes)
    assert ids_of(6, batch_size=8, **sizes) != ids_of(6, batch_size=8, num_examples=23, seed=5)


def test_both_frameworks_take_the_same_also_far_into_a_large_set():
    for step, num_examples, seed in (
        (0, 1, 0),
        (5, 13, 2**64 - 1),
        (10**6, 1_281_167, 7),
        (2**32 - 1, 2**32, 1),
        (9, 2**31 + 1, 1),
    ):
        sizes = {"batch_size": 33, "num_examples": num_examples, "seed": seed}
        expected, actual = data_order.batch_ids(step, **sizes), jax_order.batch_ids(step, **sizes)
        assert actual.dtype == np.uint32 and expected.dtype == torch.int64
        assert np.array_equal(np.asarray(actual), expected.numpy())
        assert (expected >= 0).all() and (expected < num_examples).all()


@pytest.mark.parametrize("num_examples", [3, 5, 12])
def test_every_example_comes_at_every_place_and_behind_every_other_as_often(num_examples):
    passes = 3000
    ids = data_order.batch_ids(0, batch_size=passes * num_examples, num_examples=num_examples, seed=11).view(passes, num_examples)
    for pairs, cells in ((enumerate_places(ids), num_examples**2), (neighbours(ids), num_examples * (num_examples - 1))):
        expected = len(pairs) / cells
        found = Counter(pairs)
        assert len(found) == cells
        statistic = sum((each - expected) ** 2 / expected for each in found.values())
        assert abs(statistic - cells) < 5 * (2 * cells) ** 0.5  # chi-square, whose variance is twice its mean


def enumerate_places(ids: torch.Tensor) -> list[tuple[int, int]]:
    return [(place, each) for row in ids.tolist() for place, each in enumerate(row)]


def neighbours(ids: torch.Tensor) -> list[tuple[int, int]]:
    return [pair for row in ids.tolist() for pair in pairwise(row)]


@pytest.mark.parametrize("module", [data_order, jax_order], ids=["torch", "jax"])
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be in"),
        ({"num_examples": 0}, ValueError, "num_examples must be in"),
        ({"num_examples": 2**32 + 1}, ValueError, "num_examples must be in"),
        ({"step": -1}, ValueError, "step must be in"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"step": 1.0}, TypeError, "step must be an integer"),
    ],
)
def test_bad_arguments_are_named(module, changes, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        module.batch_ids(**{"step": 0, "batch_size": 2, "num_examples": 5, "seed": 0} | changes)
