"""The block diffusion training step on many ranks: the reference's steps, in torch and in JAX."""

from pathlib import Path

import jax
import pytest
import torch
from on_four_ranks import RANKS, TOKENS, four_ranks, mesh_of
from stable_models import assert_same_to_rounding
from test_jax_sharding import mesh_of as jax_mesh_of
from text_models import KINDS, batch_of, config_of, state_of
from trained_models import same_bits, to_jax

from gaugeblock.optimized.distributed.train_block_diffusion import ShardedTrainer
from gaugeblock.optimized.jax import train_block_diffusion as jax_sharded
from gaugeblock.reference.torch import train_block_diffusion as trainer

on_ranks = pytest.fixture(scope="module")(four_ranks)


def check_trainer(kind: str, ranks: int) -> None:
    mesh = mesh_of(ranks)
    sizes = TOKENS[ranks] if ranks > 1 else [9]
    config = config_of(kind, accumulation_steps=2, activation_checkpointing=ranks == 2)
    batch, expected = batch_of(sum(sizes)), state_of(config)
    sharded = ShardedTrainer(expected, config=config, mesh=mesh)
    for _ in range(2):
        expected, expected_metrics = trainer.train_step(expected, *batch, config=config)
        metrics = sharded.step(*(each.split(sizes)[mesh.get_local_rank()] for each in batch))
        assert_same_to_rounding(vars(metrics), vars(expected_metrics), units=2**10)
    actual = sharded.state()
    assert list(actual) == list(expected) and torch.equal(actual.pop("step"), expected.pop("step"))
    assert_same_to_rounding(actual, expected, units=2**20)  # AdamW divides by gradients that may be small


@pytest.mark.parametrize(("kind", "ranks"), [("bd3-lm", 1), ("llada, tuned", 2), *((kind, RANKS) for kind in KINDS)])
def test_sharded_trainers_make_the_steps_of_the_reference(on_ranks, kind, ranks):
    assert on_ranks(check_trainer, kind, ranks) == [None] * RANKS


def check_lengths() -> list[float]:
    """Each rank's sequences are as long as they are; those of a whole batch are as long as the longest, with padding."""
    mesh, config = mesh_of(RANKS), config_of("dream")
    lengths = [11, 5, 8, 3]
    ids, labels, samples, examples = batch_of(RANKS)
    samples = torch.zeros_like(samples)
    for row, length in enumerate(lengths):
        samples[row, length:] = -1
    expected, expected_metrics = trainer.train_step(state_of(config), ids, labels, samples, examples, config=config)
    sharded, row = ShardedTrainer(state_of(config), config=config, mesh=mesh), mesh.get_local_rank()
    mine = [each[row : row + 1, : lengths[row]] for each in (ids, labels, samples)]
    metrics = sharded.step(*mine, examples[row : row + 1])
    assert_same_to_rounding(vars(metrics), vars(expected_metrics), units=2**10)
    assert_same_to_rounding(sharded.state(), expected, units=2**20)
    return [float(metrics.loss)]


def test_sequences_may_have_another_length_on_every_rank(on_ranks):
    (first, *others) = on_ranks(check_lengths)
    assert others == [first] * 3 and first[0] > 0


def check_saved(folder: str) -> None:
    """A run that goes on from what was saved is that which was not interrupted, bit for bit."""
    mesh, config, sizes = mesh_of(RANKS), config_of("sdar", accumulation_steps=2), TOKENS[RANKS]
    mine = [each.split(sizes)[mesh.get_local_rank()] for each in batch_of(sum(sizes))]
    through, resumed = (ShardedTrainer(state_of(config), config=config, mesh=mesh) for _ in range(2))
    through.step(*mine)
    resumed.run.load(through.run.save(Path(folder)))
    for trainer_of_run in (through, resumed):
        trainer_of_run.step(*mine)
    assert same_bits(resumed.state(), through.state())


def test_a_saved_run_goes_on_bit_for_bit(on_ranks, tmp_path):
    assert on_ranks(check_saved, str(tmp_path)) == [None] * RANKS


def check_bad_calls() -> list[str]:
    """What a rank is told where another one's labels are bad, and where no rank has an example; then a good step."""
    mesh, config, batch = mesh_of(RANKS), config_of("llada"), batch_of(RANKS)
    row, told = mesh.get_local_rank(), []
    sharded = ShardedTrainer(state_of(config), config=config, mesh=mesh)
    ids, labels, samples, examples = (each[row : row + 1] for each in batch)
    for bad in ((ids, labels + 20 * (row == 2), samples, examples), (ids[:0], labels[:0], samples[:0], examples[:0])):
        try:
            sharded.step(*bad)
        except ValueError as error:
            told.append(str(error))
    _, expected = trainer.train_step(state_of(config), *batch, config=config)
    assert_same_to_rounding(vars(sharded.step(ids, labels, samples, examples)), vars(expected), units=2**10)
    return told


def test_a_bad_call_raises_on_every_rank_and_the_next_call_works(on_ranks):
    for told in on_ranks(check_bad_calls):
        assert "labels must be in 0..19 or -100" in told[0], told
        assert told[1].startswith("input_ids must hold at least one example on some rank"), told


def check_not_finite() -> str:
    mesh, config, batch = mesh_of(RANKS), config_of("llada"), batch_of(RANKS)
    state, row = state_of(config), mesh.get_local_rank()
    state["model.model.transformer.ln_f.weight"][3] = torch.nan
    try:
        ShardedTrainer(state, config=config, mesh=mesh).step(*(each[row : row + 1] for each in batch))
    except FloatingPointError as error:
        return str(error)
    return "nothing raised"


def test_a_loss_that_is_not_finite_raises_on_every_rank(on_ranks):
    assert all(each.startswith("step 0: loss is not finite (loss nan") for each in on_ranks(check_not_finite))


@pytest.mark.parametrize(("kind", "ranks"), [("moe", 4), ("llada, tuned", 1), ("bd3-lm", 4)])
def test_jax_makes_the_steps_of_the_reference(kind, ranks):
    config, batch = config_of(kind, accumulation_steps=2), batch_of(7)
    state = state_of(config)
    with jax.enable_x64(True):
        jax_state = to_jax(state)
        for _ in range(2):
            state, metrics = trainer.train_step(state, *batch, config=config)
            jax_state, jax_metrics = jax_sharded.train_step(jax_state, *to_jax(batch), config=config, mesh=jax_mesh_of(ranks))
            # the share of masks is of float32, whose sum and product XLA rounds once or twice
            assert_same_to_rounding(vars(jax_metrics), vars(metrics), units=2**31)
        assert_same_to_rounding(jax_state, state, units=2**34)
