"""The step of an upcycled GPT-2 on many ranks: the reference's steps, in torch and in JAX; what is saved is gone on with."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from on_four_ranks import RANKS, TOKENS, assert_equal_to_rounding, four_ranks, mesh_of
from test_jax_sharding import assert_same_step
from test_jax_sharding import mesh_of as jax_mesh_of
from upcycled_models import CONFIG, ONE, batch, padded, trained_state

from gaugeblock.optimized.distributed.train_moe_lm import ShardedTrainer
from gaugeblock.optimized.jax import train_moe_lm as jax_sharded
from gaugeblock.reference.configs import IGNORED_LABEL, EMAConfig, MoELMConfig
from gaugeblock.reference.torch import train_moe_lm as trainer

on_ranks = pytest.fixture(scope="module")(four_ranks)
SIZES = {1: [5], **TOKENS}
CASES = {
    "one microbatch": ONE,
    # whose balance losses are of other examples than the reference's
    "microbatches": replace(CONFIG, accumulation_steps=3, balance_coefficient=0.0, optimizer="adam", ema=EMAConfig(warmup=True)),
    "recomputed": replace(ONE, activation_checkpointing=True, optimizer="sgd", model=replace(ONE.model, top_k=2)),
}


def part_of(whole: tuple[torch.Tensor, ...], ranks: int, place: int) -> list[torch.Tensor]:
    return [each.split(SIZES[ranks])[place] for each in whole]


def check_trainer(config: MoELMConfig, ranks: int) -> int:
    """Return how many experts were without tokens in the last step."""
    mesh = mesh_of(ranks)
    expected = trained_state(config, step=1)
    sharded = ShardedTrainer(expected, config=config, mesh=mesh)
    for seed in range(3):
        whole = padded(sum(SIZES[ranks]), seed)
        expected, expected_metrics = trainer.train_step(expected, *whole, config=config)
        metrics = sharded.step(*part_of(whole, ranks, mesh.get_local_rank()))
        for each, one in vars(expected_metrics).items():
            if each != "balance_loss" or config.accumulation_steps == 1:
                assert_equal_to_rounding(getattr(metrics, each), one)
    actual = sharded.state()
    assert set(actual) == set(expected)
    for each, tensor in expected.items():
        assert actual[each].dtype == tensor.dtype, each
        if tensor.is_floating_point():
            assert_equal_to_rounding(actual[each], tensor)
        else:
            assert actual[each].equal(tensor), each
    return int((metrics.load == 0).sum())


@pytest.mark.parametrize("name", CASES)
def test_sharded_trainers_make_the_steps_of_the_reference(on_ranks, name):
    idle = on_ranks(check_trainer, CASES[name], RANKS)
    assert len(set(idle)) == 1 and idle[0] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_fewer_ranks_of_which_one_may_have_nothing_make_the_steps_of_the_reference(on_ranks, ranks):
    assert all(each > 0 for each in on_ranks(check_trainer, ONE, ranks))


def check_resumed(folder: Path) -> None:
    mesh = mesh_of(RANKS)
    batches = [part_of(padded(sum(SIZES[RANKS]), seed), RANKS, mesh.get_local_rank()) for seed in range(4)]
    through = ShardedTrainer(trained_state(), config=CONFIG, mesh=mesh)
    for each in batches[:2]:
        through.step(*each)
    saved = through.run.save(folder)
    for each in batches[2:]:
        through.step(*each)
    resumed = ShardedTrainer(trained_state(step=3), config=CONFIG, mesh=mesh)
    resumed.run.load(saved)
    for each in batches[2:]:
        resumed.step(*each)
    expected = through.state()
    assert all(each.equal(expected[name]) for name, each in resumed.state().items())


def test_a_saved_run_resumes_bit_for_bit_with_its_numbers_of_updates(on_ranks, tmp_path):
    assert on_ranks(check_resumed, tmp_path) == [None] * RANKS


def check_bad_calls() -> None:
    mesh = mesh_of(RANKS)
    state, place = trained_state(), mesh.get_local_rank()
    input_ids, labels, ids = part_of(batch(sum(SIZES[RANKS])), RANKS, place)
    trainer = ShardedTrainer(state, config=ONE, mesh=mesh)
    with pytest.raises(ValueError, match="labels must be in 0..10" if place == 0 else "rank 0|other rank|another rank"):
        trainer.step(input_ids, labels + (11 if place == 0 else 0), ids)
    with pytest.raises(FloatingPointError, match="step 7: lm_loss is not finite"):
        trainer.step(input_ids, torch.full_like(labels, IGNORED_LABEL), ids)
    counts = "num_updates.transformer.h.0.mlp.experts.c_fc.bias"
    short = {**state, counts: state[counts][:-1]}
    with pytest.raises(ValueError, match=r"num_updates\.transformer\.h\.0\.mlp\.experts\.c_fc\.bias"):
        ShardedTrainer(short, config=ONE, mesh=mesh)


def test_a_bad_call_raises_on_every_rank(on_ranks):
    assert on_ranks(check_bad_calls) == [None] * RANKS


def test_jax_makes_the_steps_of_the_reference_on_four_ranks():
    """Of a batch that does not divide among them: padding counts in no load."""
    state, whole = trained_state(), padded(5)
    expected = trainer.train_step(state, *whole, config=ONE)
    with jax.enable_x64(True):
        jax_state = {name: jnp.asarray(each.numpy()) for name, each in state.items()}
        jax_batch = [jnp.asarray(each.numpy()) for each in whole]
        actual = jax_sharded.train_step(jax_state, *jax_batch, config=ONE, mesh=jax_mesh_of(4))
        assert_same_step(actual, expected)
    assert (expected[1].load == 0).any()


def test_jax_accumulates_microbatches_on_ranks():
    config = replace(CONFIG, accumulation_steps=2, balance_coefficient=0.0)
    state, whole = trained_state(config), padded(5)
    expected_state, expected = trainer.train_step(state, *whole, config=config)
    with jax.enable_x64(True):
        jax_state = {name: jnp.asarray(each.numpy()) for name, each in state.items()}
        jax_batch = [jnp.asarray(each.numpy()) for each in whole]
        new_state, metrics = jax_sharded.train_step(jax_state, *jax_batch, config=config, mesh=jax_mesh_of(2))
        metrics = replace(metrics, balance_loss=jnp.asarray(expected.balance_loss.numpy()))
        assert_same_step((new_state, metrics), (expected_state, expected))
