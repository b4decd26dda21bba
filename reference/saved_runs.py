"""Saved runs, for either framework: written whole or not at all, and told apart from those of other configs when read.

A run that one process has is a safetensors file. One that lies over ranks is a folder for each step that was saved:

    step_00000012/
        (description)  the step, the config, dtype and shape of each tensor, and the size of each other file
        state/         what the framework's library wrote

The folder gets its name when all is in it; what a run that was killed had begun to write has another, and the next save removes
it.
"""

import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

DESCRIPTION = "run.json"
STATE = "state"  # the folder of what the library writes
COUNTS_FOR_NOTHING = ("activation_checkpointing",)  # changes what is kept, not what is computed

Entries = dict[str, list[Any]]
"""Dtype and shape of each tensor of a state."""


def write_atomically(content: bytes, path: Path) -> None:
    """Write a file of which there is never a part under its name, also where the run is killed meanwhile."""
    path = Path(path)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # before its name says that it is there
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Where safetensors cannot read the file of that name, raise ValueError that says which."""
    from safetensors import SafetensorError  # what a run needs, and a step does not

    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"path must be a whole safetensors file, got {path}: {error}") from error


def require_step(state: Mapping[str, object], path: Path) -> None:
    """Raise ValueError where what was read is no state of a run."""
    if "step" not in state:
        raise ValueError(f"path must be a file with the state of a run, got {path}, which has no entry 'step'")


def metadata_of(config: Any) -> dict[str, str] | None:
    """Return what a safetensors file says of a config; None of none."""
    return None if config is None else {"config": json.dumps(described(config))}


def require_config_of_file(path: Path, config: Any) -> None:
    """Raise ValueError where a safetensors file is not of a run of this config; None is not compared."""
    from safetensors import safe_open

    if config is not None:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        if "config" not in metadata:
            raise ValueError(f"path must hold a run and its config, got {path}, which has no config")
        require_config(json.loads(metadata["config"]), config, path)


def described(config: Any, within: str = "") -> dict[str, Any]:
    """Return a config as JSON has it: its fields by name, those of a config within it by dotted names, and what kind each is."""
    fields_of = {f"{within}kind": type(config).__name__}
    for field in fields(config):
        name, value = f"{within}{field.name}", getattr(config, field.name)
        fields_of |= described(value, f"{name}.") if is_dataclass(value) else {name: json.loads(json.dumps(value))}
    return fields_of


def require_config(saved: Mapping[str, Any], config: Any, path: Path, changed: Container[str] = ()) -> None:
    """Raise ValueError where a run was saved, as `described`, with another config, but for fields that may have been changed."""
    expected = described(config)
    for name in dict.fromkeys([*expected, *saved]):
        ours, theirs = (json.dumps(each[name]) if name in each else "no such field" for each in (expected, saved))
        if ours != theirs and name not in changed and name not in COUNTS_FOR_NOTHING:
            raise ValueError(f"path must hold a run whose config has {name} {ours}, got {path}, whose has {theirs}")


def begin(folder: Path, step: int) -> Path:
    """Return a new folder for what is to be written of a step, and remove what was not finished. One process calls it.

    Raises:
        FileExistsError: The step was saved before.
    """
    folder = Path(folder)
    if step in saved_steps(folder):
        raise FileExistsError(f"folder must not hold step {step} yet, got {saved_steps(folder)[step]}")
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step_*"):
        shutil.rmtree(left)
    unfinished = folder / f".step_{step:08}"
    unfinished.mkdir()
    return unfinished


def complete(unfinished: Path, config: Any, entries: Entries) -> Path:
    """Give the folder of `begin` its name, once all is on the disk, and return it. One process calls it."""
    files = {str(each.relative_to(unfinished)): each.stat().st_size for each in unfinished.rglob("*") if each.is_file()}
    description = {"step": step_of(unfinished), "config": described(config), "entries": entries, "files": files}
    (unfinished / DESCRIPTION).write_text(json.dumps(description, indent=1))
    for each in (*unfinished.rglob("*"), unfinished):
        write_out(each)
    finished = unfinished.with_name(unfinished.name.removeprefix("."))
    unfinished.rename(finished)
    write_out(finished.parent)
    return finished


def write_out(path: Path) -> None:
    """Return once a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_of(path: Path) -> int:
    """Return the step by which a folder is named."""
    return int(path.name.rpartition("_")[2])


def saved_steps(folder: Path) -> dict[int, Path]:
    """Return the folders of the steps that were saved, the last one last."""
    return {step_of(each): each for each in sorted(Path(folder).glob("step_*"), key=step_of)}


def last_saved(folder: Path) -> Path | None:
    """Return the folder of the last step that was saved; None where none was."""
    return next(reversed(saved_steps(folder).values()), None)


def require_saved(path: Path, config: Any, entries: Entries, changed: Container[str] = ()) -> int:
    """Return the step of a run that was saved whole, of that config, and with these tensors.

    Args:
        path: What `complete` returned.
        config: Of the run that is to go on.
        entries: Its tensors.
        changed: Names of the config's fields, as of `described`, which may be others than were saved.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It has no description, or another than it should; a file is missing or of another size.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"path must be a folder with a saved run, got {path}, which is none")
    try:
        description = json.loads((path / DESCRIPTION).read_text())
        saved, files, step = description["config"], description["files"], int(description["step"])
        theirs = description["entries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"path must be a folder with a saved run, got {path}, whose {DESCRIPTION} does not say so: {error!r}"
        ) from error
    require_config(saved, config, path, changed)
    for name in dict.fromkeys([*entries, *theirs]):
        if entries.get(name) != theirs.get(name):
            raise ValueError(f"path must hold {name} as {entries.get(name)}, got {path}, where it is {theirs.get(name)}")
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            raise ValueError(f"path must hold {name} of {size} bytes, got {path}, where it has {found}")
    return step
