"""Runs over many ranks on disk: each rank writes its parts, and any number of ranks reads them (torch.distributed.checkpoint).

    folder/step_00000012/state/__0_0.distcp, __1_0.distcp, ..., .metadata

What is read must come from where one trusts: the library's .metadata is a pickle.
"""

from collections.abc import Callable, Container, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.reference import saved_runs
from gaugeblock.reference.configs import TrainingConfig

Shards = Mapping[str, torch.Tensor]


def save(state: Shards, folder: Path, *, config: TrainingConfig, mesh: DeviceMesh) -> Path:
    """Write a state whose tensors are DTensors, but for the step, and return where it lies; every rank calls it.

    Raises:
        FileExistsError: The step was saved before; the other ranks raise ValueError.
        OSError: It cannot be written.
    """
    folder, step = Path(folder), int(state["step"])
    unfinished = folder / f".step_{step:08}"
    _first_rank(lambda: saved_runs.begin(folder, step), mesh)
    try:
        writer = checkpoint.FileSystemWriter(unfinished / saved_runs.STATE)
        checkpoint.save(dict(state), storage_writer=writer, process_group=mesh.get_group())
    except CheckpointException as error:  # on every rank
        raise OSError(f"folder must be one that every rank can write to, got {folder}: {error}") from error
    _first_rank(lambda: saved_runs.complete(unfinished, config, entries(state)), mesh)
    return folder / f"step_{step:08}"


def load(state: Shards, path: Path, *, config: TrainingConfig, mesh: DeviceMesh, changed: Container[str] = ()) -> torch.Tensor:
    """Read what `save` wrote into the parts of a state that lie here, and return the step; every rank calls it.

    Raises: as `saved_runs.require_saved`, before anything is changed; the other ranks raise ValueError, too. And
        ValueError: A file of the right size does not hold what it should. Then parts of the state may have been changed.
    """
    error, step = None, 0
    try:
        step = saved_runs.require_saved(path, config, entries(state), changed)
    except (OSError, ValueError) as raised:
        error = raised  # raised again once the other ranks know
    _tell(error, mesh, {"path must hold the same step": step})
    read = {**state, "step": torch.zeros_like(state["step"])}
    try:
        reader = checkpoint.FileSystemReader(Path(path) / saved_runs.STATE)
        checkpoint.load(read, storage_reader=reader, process_group=mesh.get_group())
    except CheckpointException as broken:
        raise ValueError(f"path must hold whole files of a saved run, got {path}: {broken}") from broken
    return read["step"]


def entries(state: Shards) -> saved_runs.Entries:
    """Return dtypes and shapes of the whole tensors."""
    return {name: [str(each.dtype).removeprefix("torch."), list(each.shape)] for name, each in state.items()}


def _first_rank(act: Callable[[], object], mesh: DeviceMesh) -> None:
    """Let the first rank act; where it raises OSError, all do."""
    error = None
    if mesh.get_local_rank() == 0:
        try:
            act()
        except OSError as raised:
            error = raised
    _tell(error, mesh, {})


def _tell(error: Exception | None, mesh: DeviceMesh, facts: Mapping[str, int]) -> None:
    agree(torch.zeros(mesh.size(), dtype=torch.int64, device=mesh.device_type), facts, error, mesh)
