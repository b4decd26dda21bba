"""Files of saved runs, for either framework: written whole or not at all, and told apart from others when read."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile


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
