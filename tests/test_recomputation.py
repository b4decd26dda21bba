"""Activation checkpointing of every model: fewer bytes are kept for the backward pass, and the results are the same."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from trained_models import MODELS, batch_of, config_of, state_of, to_jax

from gaugeblock.reference.configs import EMAConfig
from gaugeblock.reference.jax import train_image_diffusion as jax_trainer
from gaugeblock.reference.jax import training as jax_training
from gaugeblock.reference.jax.recomputation import blocks_recomputed
from gaugeblock.reference.torch import dit, training
from gaugeblock.reference.torch import recomputation as torch_recomputation
from gaugeblock.reference.torch import train_image_diffusion as trainer

EPS = np.finfo(np.float64).eps
LEAST = 4  # times fewer bytes are kept


def step_and_bytes(name: str, **changes) -> tuple[dict[str, torch.Tensor], int]:
    """A state after a step, and the bytes of all that autograd keeps outside of recomputed blocks."""
    config, (step, batch) = config_of(name, ema=EMAConfig(), accumulation_steps=2, **changes), batch_of(name)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        state, metrics = getattr(trainer, step)(state_of(config), *batch, config=config)
    return state | vars(metrics), sum(kept.values())


@pytest.mark.parametrize("compute_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_recomputed_bit_for_bit_also_with_dropped_labels(name, compute_dtype):
    config = config_of(name)
    dropped = trainer.draws(batch_of(name)[1][0], batch_of(name)[1][-1], 0, config=config)[2]
    assert dropped.any() and not dropped.all()
    (expected, all_bytes), (actual, bytes_kept) = (
        step_and_bytes(name, compute_dtype=compute_dtype, activation_checkpointing=asked) for asked in (False, True)
    )
    assert all(torch.equal(actual[key], each) for key, each in expected.items())
    assert LEAST * bytes_kept < all_bytes


def bytes_kept_in_jax(name: str, is_asked_for: bool) -> int:
    """What the backward pass of JAX takes, as traced."""
    config, batch = config_of(name), to_jax(batch_of(name)[1])
    full = (batch[0], batch[1], None, None, batch[2]) if len(batch) == 3 else (batch[0], None, *batch[1:])

    def loss(parameters):
        with blocks_recomputed(is_asked_for):
            return jax_trainer.shares(parameters, *full, batch_size=5, step=0, config=config)[0]

    parameters = jax_training.part_of_state(to_jax(state_of(config)), "model")
    kept = jax.eval_shape(lambda parameters: jax.vjp(loss, parameters)[1], parameters)
    return sum(each.size * each.dtype.itemsize for each in jax.tree.leaves(kept))


@pytest.mark.parametrize("name", MODELS)
def test_jax_keeps_fewer_bytes_too(name):
    with jax.enable_x64(True):
        assert 2 * bytes_kept_in_jax(name, True) < bytes_kept_in_jax(name, False)


def test_jax_makes_the_same_step_but_for_roundings():
    step, batch = batch_of("dit")
    results = []
    with jax.enable_x64(True):
        for asked in (False, True):
            config = config_of("dit", activation_checkpointing=asked)
            state, metrics = getattr(jax_trainer, step)(to_jax(state_of(config)), *to_jax(batch), config=config)
            results.append(state | vars(metrics))
    for key, each in results[0].items():
        assert np.abs(np.asarray(results[1][key] - each)).max() <= 1024 * EPS * max(np.abs(np.asarray(each)).max(), 1e-300), key


def test_what_is_asked_for_ends_with_its_block_also_after_an_error():
    with pytest.raises(ZeroDivisionError), torch_recomputation.blocks_recomputed(True):
        raise ZeroDivisionError
    calls = []
    block = torch_recomputation.recomputable(lambda x: calls.append(1) or x.sin())
    x = torch.ones(3, requires_grad=True)
    block(x).sum().backward()
    assert len(calls) == 1
    with torch_recomputation.blocks_recomputed(True):
        out = block(x)
    out.sum().backward()
    assert len(calls) == 3


def test_torch_compile_sees_no_difference():
    config = MODELS["dit"]
    block = partial(dit.block, config=config)
    state = dit.block_state(training.part_of_state(state_of(config_of("dit")), "model"), 0)
    arrays = torch.ones(2, 4, 16, dtype=torch.float64), torch.ones(2, 16, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(state, *arrays), block(state, *arrays), rtol=64 * EPS, atol=64 * EPS)
