"""Runs over a mesh on disk, as Orbax lays them out: each device's parts are written, and read into any other mesh.

    folder/step_00000012/state/    what orbax.checkpoint.StandardCheckpointer writes

For runs whose devices all belong to one process.
"""

from collections.abc import Container, Mapping
from pathlib import Path

import jax

from gaugeblock.reference import saved_runs
from gaugeblock.reference.configs import TrainingConfig


def save(state: Mapping[str, jax.Array], folder: Path, *, config: TrainingConfig) -> Path:
    """Write a state to a folder of its step within `folder`, and return it.

    The folder appears under its name when it is whole: a run that is killed while it writes leaves the last one before.

    Raises:
        FileExistsError: The step was saved before.
        OSError: It cannot be written.
    """
    import orbax.checkpoint as orbax  # what a run needs, and a step does not

    unfinished = saved_runs.begin(folder, int(state["step"]))
    with orbax.StandardCheckpointer() as checkpointer:  # waits until all is written
        checkpointer.save(unfinished.absolute() / saved_runs.STATE, dict(state))
    return saved_runs.complete(unfinished, config, entries(state))


def load(
    path: Path, like: Mapping[str, jax.Array], *, config: TrainingConfig, changed: Container[str] = ()
) -> dict[str, jax.Array]:
    """Read what `save` wrote, and place it as another state lies.

    Args:
        path: What `save` returned; `gaugeblock.reference.saved_runs.last_saved` finds the last one.
        like: A state of the run, such as its initial one, or `jax.ShapeDtypeStruct`s with their shardings.
        config: Of the run.
        changed: Names of fields of the config that may be others than those that were saved, `model.depth` of its model's.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: What is there is no whole saved run, or one of another config or of other tensors.
    """
    import orbax.checkpoint as orbax

    saved_runs.require_saved(path, config, entries(like), changed)
    places = {name: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=each.sharding) for name, each in like.items()}
    try:
        with orbax.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(Path(path).absolute() / saved_runs.STATE, places)
    except Exception as broken:  # Orbax raises no narrower one
        raise ValueError(f"path must hold whole files of a saved run, got {path}: {broken}") from broken


def entries(state: Mapping[str, jax.Array]) -> saved_runs.Entries:
    """Return dtypes and shapes of the arrays."""
    return {name: [str(each.dtype), list(each.shape)] for name, each in state.items()}
