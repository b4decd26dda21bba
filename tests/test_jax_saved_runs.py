"""Saved runs in JAX, as Orbax lays them out: they go on over other meshes, and what is none is told."""

import gc
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from on_four_ranks import assert_equal_to_rounding
from spoilt_runs import CONFIG, OTHERS, SPOILT, STEPS, batch_of_step, spoil, state_of
from test_jax_sharding import mesh_of, to_jax

from gaugeblock.optimized.jax import saved_runs as jax_runs
from gaugeblock.optimized.jax import train_image_diffusion as sharded
from gaugeblock.optimized.jax import training
from gaugeblock.reference import saved_runs
from gaugeblock.reference.torch import train_image_diffusion as trainer


def test_a_run_in_jax_goes_on_over_other_meshes(tmp_path):
    with jax.enable_x64(True):
        state, expected, placed = to_jax(state_of(CONFIG)), state_of(CONFIG), None
        for start, ranks in zip((0, 2, 4), (2, 4, 1), strict=True):
            mesh = mesh_of(ranks)
            placed = training.shard_state(state, mesh)
            if start:
                last = saved_runs.last_saved(tmp_path)
                loaded = jax_runs.load(last, placed, config=CONFIG)
                assert list(loaded) == list(placed)
                for name, each in placed.items():
                    assert loaded[name].sharding == each.sharding and np.array_equal(loaded[name], each)
                    assert loaded[name].dtype == each.dtype
                placed = loaded
            for step in range(start, min(start + 2, STEPS)):
                placed, _ = sharded.train_step(placed, *to_jax(batch_of_step(step)), config=CONFIG, mesh=mesh)
            jax_runs.save(placed, tmp_path, config=CONFIG)
            state = {name: jax.numpy.asarray(np.asarray(each)) for name, each in placed.items()}
        for step in range(STEPS):
            expected, _ = trainer.train_step(expected, *batch_of_step(step), config=CONFIG)
        for name, each in expected.items():
            assert_equal_to_rounding(torch.tensor(np.asarray(state[name])).double(), each.double())
    assert [each.name for each in saved_runs.saved_steps(tmp_path).values()] == [f"step_{step:08}" for step in (2, 4, 5)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_no_saved_run_of_the_config_is_told_in_jax(tmp_path):
    with jax.enable_x64(True):
        state = to_jax(state_of(CONFIG))
        path = jax_runs.save(state, tmp_path / "right", config=CONFIG)
        with pytest.raises(FileExistsError, match="folder must not hold step 0 yet"):
            jax_runs.save(state, tmp_path / "right", config=CONFIG)
        with pytest.raises(FileNotFoundError):
            jax_runs.load(tmp_path / "nowhere", state, config=CONFIG)
        for how, message in SPOILT.items():
            spoil(jax_runs.save(state, tmp_path / how, config=CONFIG), how)
            with pytest.raises(ValueError, match=message):
                jax_runs.load(tmp_path / how / "step_00000000", state, config=CONFIG)
        gc.collect()  # what Orbax had begun to read, which complains when the process ends
        for changes, message in OTHERS.values():
            with pytest.raises(ValueError, match=message):
                jax_runs.load(path, state, config=replace(CONFIG, **changes))
        loaded = jax_runs.load(path, state, config=replace(CONFIG, seed=8), changed=("seed",))
        assert all(np.array_equal(loaded[name], each) for name, each in state.items())
