"""The Stable Diffusion training step on many ranks: the reference's steps, in torch and in JAX."""

import pytest
import torch
from on_four_ranks import RANKS, TOKENS, four_ranks, mesh_of
from stable_models import KINDS, assert_same_to_rounding, batch_of, config_of, frozen_of, state_of

from gaugeblock.optimized.distributed.train_stable_diffusion import ShardedTrainer
from gaugeblock.reference.torch import train_stable_diffusion as trainer

on_ranks = pytest.fixture(scope="module")(four_ranks)


def check_trainer(kind: str, ranks: int) -> None:
    mesh = mesh_of(ranks)
    sizes = TOKENS[ranks] if ranks > 1 else [9]
    config = config_of(kind, accumulation_steps=2)
    frozen, batch = frozen_of(config), batch_of(config, sum(sizes))
    expected = state_of(config)
    sharded = ShardedTrainer(expected, frozen, config=config, mesh=mesh)
    for _ in range(2):
        expected, expected_metrics = trainer.train_step(expected, frozen, *batch, config=config)
        metrics = sharded.step(*(each.split(sizes)[mesh.get_local_rank()] for each in batch))
        assert_same_to_rounding(vars(metrics), vars(expected_metrics), units=2**10)
    actual = sharded.state()
    assert list(actual) == list(expected) and torch.equal(actual.pop("step"), expected.pop("step"))
    assert_same_to_rounding(actual, expected, units=2**14)


@pytest.mark.parametrize("ranks", [1, 2, RANKS])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_trainers_make_the_steps_of_the_reference(on_ranks, kind, ranks):
    assert on_ranks(check_trainer, kind, ranks) == [None] * RANKS
