"""The step of text-latent diffusion with cycles on many ranks: the reference's steps, in torch and in JAX."""

import jax
import pytest
import torch
from cycle_models import KINDS, STEP, batch_of, config_of, state_of
from on_four_ranks import RANKS, TOKENS, four_ranks, mesh_of
from stable_models import assert_same_to_rounding
from test_jax_sharding import mesh_of as jax_mesh_of
from trained_models import to_jax

from gaugeblock.optimized.distributed.train_cycle_vae import ShardedTrainer
from gaugeblock.optimized.jax import train_cycle_vae as jax_sharded
from gaugeblock.reference import saved_runs
from gaugeblock.reference.torch import train_cycle_vae as trainer

on_ranks = pytest.fixture(scope="module")(four_ranks)


def check_trainer(kind: str, ranks: int, folder) -> None:
    """Make three steps as the reference does, the last one after the run was saved and loaded, with blocks recomputed."""
    mesh, sizes = mesh_of(ranks), TOKENS[ranks] if ranks > 1 else [9]
    config, batch = config_of(kind, accumulation_steps=2, cycle_every=2 if kind == "latents" else None), batch_of(sum(sizes))
    mine = [each.split(sizes)[mesh.get_local_rank()] for each in batch]
    expected = state_of(config)
    sharded = ShardedTrainer(expected, config=config, mesh=mesh)
    for place in range(3):
        if place == 2 and ranks == RANKS:
            saved = sharded.run.save(folder / kind)
            sharded = ShardedTrainer(state_of(config), config=config, mesh=mesh)
            sharded.run.load(saved)
        expected, expected_metrics = trainer.train_step(expected, *batch, config=config)
        assert_same_to_rounding(vars(sharded.step(*mine)), vars(expected_metrics), units=2**11)
    actual = sharded.state()
    assert list(actual) == list(expected) and torch.equal(actual.pop("step"), expected.pop("step"))
    assert [each.shape for each in actual.values()] == [each.shape for each in expected.values()]
    assert_same_to_rounding(actual, expected, units=2**16)


@pytest.mark.parametrize(("kind", "ranks"), [("velocity", 1), ("velocity", 2), *((kind, RANKS) for kind in KINDS)])
def test_sharded_trainers_make_the_steps_of_the_reference(on_ranks, kind, ranks, tmp_path):
    assert on_ranks(check_trainer, kind, ranks, tmp_path) == [None] * RANKS
    if ranks == RANKS:
        assert saved_runs.last_saved(tmp_path / kind).name.endswith(str(STEP + 2))


def check_recomputation() -> None:
    mesh, sizes, batch = mesh_of(RANKS), TOKENS[RANKS], batch_of(sum(TOKENS[RANKS]))
    mine = [each.split(sizes)[mesh.get_local_rank()] for each in batch]
    states = []
    for is_asked_for in (False, True):
        config = config_of("velocity", activation_checkpointing=is_asked_for)
        sharded = ShardedTrainer(state_of(config), config=config, mesh=mesh)
        sharded.step(*mine)
        states.append(sharded.state())
    assert all(torch.equal(states[1][name], each) for name, each in states[0].items())


def test_blocks_are_recomputed_on_every_rank_bit_for_bit(on_ranks):
    assert on_ranks(check_recomputation) == [None] * RANKS


def check_bad_calls() -> list[str]:
    """What a rank is told where another one's latents are bad, and where no rank has an example, and where one has a NaN."""
    mesh, config = mesh_of(RANKS), config_of("as it is published")
    rank, batch, told = mesh.get_local_rank(), batch_of(RANKS), []
    ids, latents, mask, example_ids = (each[rank : rank + 1] for each in batch)
    sharded = ShardedTrainer(state_of(config), config=config, mesh=mesh)
    for call in (
        (ids, latents[:, : 4 if rank == 1 else None], mask, example_ids),
        [each[:0] for each in (ids, latents, mask, example_ids)],
        (ids, latents * (torch.nan if rank == 2 else 1), mask, example_ids),
    ):
        with pytest.raises((ValueError, FloatingPointError), match=r"must|not finite") as raised:
            sharded.step(*call)
        told.append(str(raised.value))
    return told


def test_bad_calls_of_one_rank_raise_on_all(on_ranks):
    for rank, (short, empty, infinite) in enumerate(on_ranks(check_bad_calls)):
        assert short.startswith("latents must be") and short.endswith("(on rank 1)") == (rank != 1)
        assert empty.startswith("latents must hold at least one example on some rank")
        assert infinite.startswith(f"step {STEP}: latent_norm is not finite")


def test_jax_makes_the_steps_of_the_reference_on_four_ranks():
    config, batch = config_of("velocity", accumulation_steps=2), batch_of()
    state = state_of(config)
    expected, expected_metrics = trainer.train_step(state, *batch, config=config)
    with jax.enable_x64(True):
        call = to_jax(state), *to_jax(batch)
        actual, metrics = jax_sharded.train_step(*call, config=config, mesh=jax_mesh_of(4))
        assert_same_to_rounding(vars(metrics), vars(expected_metrics), units=2**10)
        assert_same_to_rounding(actual, expected, units=2**20)
        assert {len(each.devices()) for each in vars(metrics).values()} == {4}  # so that those of several steps can be stacked
        compiled = jax_sharded.training.sharded_step._cache_size()
        bad = call[0] | {"model.text_head.bias": call[0]["model.text_head.bias"].at[0].set(jax.numpy.inf)}
        with pytest.raises(FloatingPointError, match=r"^step 7: base_l2t_text_loss is not finite"):
            jax_sharded.train_step(bad, *call[1:], config=config, mesh=jax_mesh_of(4))
        assert jax_sharded.training.sharded_step._cache_size() == compiled
