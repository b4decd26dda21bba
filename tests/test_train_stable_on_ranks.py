"""The Stable Diffusion training step on many ranks: the reference's steps, in torch and in JAX."""

from dataclasses import replace

import jax
import pytest
import torch
from on_four_ranks import RANKS, TOKENS, four_ranks, mesh_of
from stable_models import KINDS, assert_same_to_rounding, batch_of, config_of, frozen_of, state_of
from test_jax_sharding import mesh_of as jax_mesh_of
from trained_models import to_jax

from gaugeblock.optimized.distributed.train_stable_diffusion import ShardedTrainer
from gaugeblock.optimized.jax import train_stable_diffusion as jax_sharded
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


@pytest.mark.parametrize(("kind", "ranks"), [("1", 1), ("2", 2), *((kind, RANKS) for kind in KINDS)])
def test_sharded_trainers_make_the_steps_of_the_reference(on_ranks, kind, ranks):
    assert on_ranks(check_trainer, kind, ranks) == [None] * RANKS


def check_bad_calls() -> list[str]:
    """What a rank is told where another one's images, or its frozen parameters, are bad, and where no rank has an example."""
    mesh, config = mesh_of(RANKS), config_of("xl")
    rank, told = mesh.get_local_rank(), []
    frozen, batch = frozen_of(config), batch_of(config, RANKS)
    mine = [each[rank : rank + 1] for each in batch]
    lacking = dict(list(frozen.items())[: -(rank == 2) or None])
    sharded = ShardedTrainer(state_of(config), frozen, config=config, mesh=mesh)
    short = [mine[0][:, :, : 1 if rank == 1 else None], *mine[1:]]
    for call in (
        lambda: ShardedTrainer(state_of(config), lacking, config=config, mesh=mesh),
        lambda: sharded.step(*short),
        lambda: sharded.step(*(each[:0] for each in mine)),
    ):
        with pytest.raises(ValueError, match="must") as raised:
            call()
        told.append(str(raised.value))
    return told


def test_bad_calls_of_one_rank_raise_on_all(on_ranks):
    for rank, (lacking, short, empty) in enumerate(on_ranks(check_bad_calls)):
        assert lacking.startswith("frozen must have text_encoder_2.") and lacking.endswith("(on rank 2)") == (rank != 2)
        assert short.startswith("images must have a height and a width") and short.endswith("(on rank 1)") == (rank != 1)
        assert empty.startswith("images must hold at least one example on some rank")


def check_embeddings() -> None:
    mesh, sizes, config = mesh_of(RANKS), TOKENS[RANKS], config_of("xl", accumulation_steps=2)
    state, frozen, (images, input_ids, *others) = state_of(config), frozen_of(config), batch_of(config, sum(sizes))
    expected, _ = trainer.train_step(state, frozen, images, input_ids, *others, config=config)
    texts = trainer.encode_texts(frozen, input_ids, config=config)
    of_vae = {name: each for name, each in frozen.items() if name.startswith("vae.")}
    sharded = ShardedTrainer(state, of_vae, config=replace(config, text_encoders=()), mesh=mesh)
    sharded.step_on_embeddings(*(each.split(sizes)[mesh.get_local_rank()] for each in (images, *texts, *others)))
    assert_same_to_rounding(sharded.state(), expected, units=2**14)


def test_ranks_take_texts_that_are_encoded_already(on_ranks):
    assert on_ranks(check_embeddings) == [None] * RANKS


@pytest.mark.parametrize(("kind", "num_ranks"), [("xl, text trained", 4), ("1", 2)])
def test_jax_makes_the_steps_of_the_reference(kind, num_ranks):
    config = config_of(kind, accumulation_steps=2)
    state, frozen, batch = state_of(config), frozen_of(config), batch_of(config)
    expected, expected_metrics = trainer.train_step(state, frozen, *batch, config=config)
    mesh = jax_mesh_of(num_ranks)
    with jax.enable_x64(True):
        jax_state, jax_frozen, jax_batch = to_jax(state), to_jax(frozen), to_jax(batch)
        actual, metrics = jax_sharded.train_step(jax_state, jax_frozen, *jax_batch, config=config, mesh=mesh)
        assert_same_to_rounding(vars(metrics), vars(expected_metrics), units=2**10)
        assert_same_to_rounding(actual, expected, units=2**20)
        if kind == "1":
            texts = to_jax(trainer.encode_texts(frozen, batch[1], config=config)[0]), None
            of_vae = {name: each for name, each in jax_frozen.items() if name.startswith("vae.")}
            call = jax_state, of_vae, jax_batch[0], *texts, *jax_batch[2:]
            again, _ = jax_sharded.train_step_on_embeddings(*call, config=config, mesh=mesh)
            assert_same_to_rounding(again, expected, units=2**20)
