"""The image-diffusion training step of every model on many ranks: the reference's steps, in torch and in JAX."""

import jax
import pytest
import torch
from on_four_ranks import RANKS, TOKENS, assert_equal_to_rounding, four_ranks, mesh_of
from test_jax_sharding import assert_same_step
from test_jax_sharding import mesh_of as jax_mesh_of
from trained_models import OPTIONS, batch_of, config_of, state_of, to_jax

from gaugeblock.optimized.distributed.train_image_diffusion import ShardedTrainer
from gaugeblock.optimized.jax import train_image_diffusion as jax_sharded
from gaugeblock.reference.configs import EMAConfig
from gaugeblock.reference.torch import train_image_diffusion as trainer

on_ranks = pytest.fixture(scope="module")(four_ranks)
CASES = {
    "dit_moe": OPTIONS["usual"],
    "unet": {"optimizer": "sgd", "ema": EMAConfig(warmup=True), "accumulation_steps": 2},
    "flux": {"optimizer": "adam", "accumulation_steps": 2},
    "mmdit": OPTIONS["noise"],
}


def check_trainer(name: str) -> None:
    mesh, sizes = mesh_of(RANKS), TOKENS[RANKS]
    config, (step, batch) = config_of(name, **CASES[name]), batch_of(name, sum(sizes))
    expected = state_of(config)
    sharded = ShardedTrainer(expected, config=config, mesh=mesh)
    for _ in range(2):
        expected, expected_metrics = getattr(trainer, step)(expected, *batch, config=config)
        mine = [None if each is None else each.split(sizes)[mesh.get_local_rank()] for each in batch]
        metrics = (sharded.step if step == "train_step" else sharded.step_on_texts)(*mine)
        for each, one in vars(expected_metrics).items():
            assert_equal_to_rounding(getattr(metrics, each), one)
    actual = sharded.state()
    assert list(actual) == list(expected) and torch.equal(actual.pop("step"), expected.pop("step"))
    for each, tensor in expected.items():
        assert_equal_to_rounding(actual[each], tensor)


@pytest.mark.parametrize("name", CASES)
def test_sharded_trainers_make_the_steps_of_the_reference(on_ranks, name):
    assert on_ranks(check_trainer, name) == [None] * RANKS


def check_masters() -> float:
    """Return how far gradients in bfloat16 are from those in the dtype of the state, of which masters are."""
    mesh = mesh_of(RANKS)
    norms = []
    for compute_dtype in (None, "bfloat16"):
        config = config_of("mmdit", compute_dtype=compute_dtype, accumulation_steps=2)
        state = {name: each if name == "step" else each.float() for name, each in state_of(config).items()}
        step, batch = batch_of("mmdit", RANKS)
        sharded = ShardedTrainer(state, config=config, mesh=mesh)
        place = mesh.get_local_rank()
        mine = [each[place : place + 1] if not each.is_floating_point() else each[place : place + 1].float() for each in batch]
        norms.append(float(sharded.step_on_texts(*mine).gradient_norm))
        assert all(each.dtype == torch.float32 for name, each in sharded.state().items() if name != "step")
        if compute_dtype:
            whole = [each if not each.is_floating_point() else each.float() for each in batch]
            _, expected = getattr(trainer, step)(state, *whole, config=config)
            assert abs(norms[-1] / float(expected.gradient_norm) - 1) < 0.02
    return abs(norms[1] / norms[0] - 1)


def test_ranks_gather_parameters_in_the_compute_dtype_and_keep_wide_masters(on_ranks):
    assert all(1e-5 < far < 0.02 for far in on_ranks(check_masters))


def check_recomputation(name: str) -> float:
    """Return how many times fewer bytes autograd keeps on this rank; the states are the same, bit for bit."""
    mesh, sizes = mesh_of(RANKS), TOKENS[RANKS]
    _, batch = batch_of(name, sum(sizes))
    mine = [None if each is None else each.split(sizes)[mesh.get_local_rank()] for each in batch]
    states, totals = [], []
    for is_asked_for in (False, True):
        config = config_of(name, **CASES[name], activation_checkpointing=is_asked_for)
        sharded, kept = ShardedTrainer(state_of(config), config=config, mesh=mesh), {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            if type(tensor) is torch.Tensor:  # parameters are kept in either way
                kept[id(tensor)] = tensor.nbytes
            return tensor

        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                (sharded.step if len(mine) == 3 else sharded.step_on_texts)(*mine)
        states.append(sharded.state())
        totals.append(sum(kept.values()))
    assert all(torch.equal(states[1][key], each) for key, each in states[0].items())
    return totals[0] / max(1, totals[1])


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_recomputed_on_every_rank_bit_for_bit(on_ranks, name):
    fewer = on_ranks(check_recomputation, name)
    assert all(each > 2 for rank, each in enumerate(fewer) if TOKENS[RANKS][rank]), fewer


@pytest.mark.parametrize("name", ["dit_moe", "unet"])
def test_jax_makes_the_steps_of_the_reference_on_four_ranks(name):
    config, (step, batch) = config_of(name, **CASES[name]), batch_of(name, 4 if name == "dit_moe" else 5)
    state = state_of(config)
    expected = getattr(trainer, step)(state, *batch, config=config)
    with jax.enable_x64(True):
        actual = getattr(jax_sharded, step)(to_jax(state), *to_jax(batch), config=config, mesh=jax_mesh_of(4))
        assert_same_step(actual, expected)


def test_jax_rejects_a_batch_whose_padding_would_count_in_the_load_of_experts():
    config, (step, batch) = config_of("dit_moe"), batch_of("dit_moe", 5)
    with pytest.raises(ValueError, match=r"images must divide among 4 ranks and 1 microbatches, got 5 examples"):
        getattr(jax_sharded, step)(to_jax(state_of(config)), *to_jax(batch), config=config, mesh=jax_mesh_of(4))
