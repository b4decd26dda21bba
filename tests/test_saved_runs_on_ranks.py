"""Saved runs over ranks: they go on over other numbers of ranks, and after kills, and what is none is told."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from on_four_ranks import RANKS, assert_equal_to_rounding, four_ranks, mesh_of
from spoilt_runs import CONFIG, OTHERS, SPOILT, STEPS, batch_of_step, spoil, state_of
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.train_image_diffusion import ShardedTrainer
from gaugeblock.reference import saved_runs
from gaugeblock.reference.torch import train_image_diffusion as trainer

on_ranks = pytest.fixture(scope="module")(four_ranks)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], each) for name, each in other.items())


def train(sharded: ShardedTrainer, steps: range, mesh: DeviceMesh) -> None:
    for step in steps:
        sharded.step(*(each.tensor_split(mesh.size())[mesh.get_local_rank()] for each in batch_of_step(step)))


def check_resharding(folder: Path) -> None:
    """Two ranks, then four, then one, from disk to disk; each set of ranks that makes the same has a folder of its own."""
    state, expected = state_of(CONFIG), state_of(CONFIG)
    for start, (ranks, before) in zip((0, 2, 4), ((2, None), (4, 2), (1, 4)), strict=True):
        mesh, steps = mesh_of(ranks), range(start, min(start + 2, STEPS))
        resumed = ShardedTrainer(state_of(replace(CONFIG, seed=9)), config=CONFIG, mesh=mesh)  # other numbers, to be overwritten
        whole = ShardedTrainer(state, config=CONFIG, mesh=mesh)
        if before:
            last = saved_runs.last_saved(folder / f"{before}-0")
            assert last is not None and last.name == f"step_{start:08}"
            resumed.run.load(last)
        else:
            resumed = ShardedTrainer(state, config=CONFIG, mesh=mesh)
        assert same(resumed.state(), state)
        train(resumed, steps, mesh)
        train(whole, steps, mesh)  # what was never on disk
        state = resumed.state()
        assert same(state, whole.state())
        resumed.run.save(folder / f"{ranks}-{torch.distributed.get_rank() // ranks}")
        torch.distributed.barrier()
    for step in range(STEPS):
        expected, _ = trainer.train_step(expected, *batch_of_step(step), config=CONFIG)
    for name, each in expected.items():
        assert_equal_to_rounding(state[name].double(), each.double())


def test_a_run_goes_on_over_other_numbers_of_ranks(on_ranks, tmp_path):
    assert on_ranks(check_resharding, tmp_path) == [None] * RANKS


def check_rejections(folder: Path) -> list[str]:
    """What loading raises, on every rank, of what is no saved run of this config; that nothing was changed; and that a right one
    is loaded nevertheless.
    """
    mesh, told = mesh_of(RANKS), []
    sharded = ShardedTrainer(state_of(CONFIG), config=CONFIG, mesh=mesh)
    sharded.run.save(folder / "right")
    for how in SPOILT:
        sharded.run.save(folder / how)
        if mesh.get_local_rank() == 0:
            spoil(folder / how / "step_00000000", how)
        torch.distributed.barrier()
    for attempt in (lambda: sharded.run.save(folder / "right"), lambda: sharded.run.load(folder / "nowhere")):
        told.append(raised_by(attempt))
    train(sharded, range(1), mesh)
    before = sharded.state()
    for how in SPOILT:
        told.append(raised_by(lambda how=how: sharded.run.load(folder / how / "step_00000000")))
        assert how == "other content" or same(sharded.state(), before)
    for changes, _ in OTHERS.values():
        config = replace(CONFIG, **changes)
        other = ShardedTrainer(state_of(config), config=config, mesh=mesh)
        told.append(raised_by(lambda other=other: other.run.load(folder / "right" / "step_00000000")))
        assert same(other.state(), state_of(config))
    sharded.run.load(folder / "right" / "step_00000000")
    assert same(sharded.state(), state_of(CONFIG))
    faster = ShardedTrainer(before, config=replace(CONFIG, learning_rate=0.5), mesh=mesh)
    faster.run.load(folder / "right" / "step_00000000", changed=("learning_rate",))
    assert same(faster.state(), state_of(CONFIG))
    return told


def raised_by(attempt) -> str:
    try:
        attempt()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


FIRST = [
    r"FileExistsError: folder must not hold step 0 yet, got ",
    r"FileNotFoundError: path must be a folder with a saved run, got ",
]
EXPECTED = [
    *FIRST,
    *(f"ValueError: {message}" for message in SPOILT.values()),
    *(f"ValueError: path must hold a run whose config has {message}" for _, message in OTHERS.values()),
]


def test_what_is_no_saved_run_of_the_config_is_told_on_every_rank(on_ranks, tmp_path):
    for rank, told in enumerate(on_ranks(check_rejections, tmp_path)):
        assert len(told) == len(EXPECTED)
        for message, expected in zip(told, EXPECTED, strict=True):
            wanted = expected if rank == 0 else expected.replace("FileExistsError", "ValueError")
            assert re.match(wanted, message), message
