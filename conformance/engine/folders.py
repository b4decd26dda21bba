"""A folder of candidates: the files in it that register something."""

import os
from collections.abc import Iterator
from pathlib import Path

from gaugeblock.conformance.engine.kept.imports import told
from gaugeblock.conformance.engine.registry import RegistrationError

SKIPPED = frozenset({"__pycache__", "node_modules", "build", "dist"})


def files_of(folder: str) -> tuple[str, ...]:
    """The files of a folder, and of those below it, that import `implements`, as their texts say; none is run.

    Raises:
        RegistrationError: If there is none.
    """
    found = tuple(str(each) for each in _files(folder) if imports_implements(each))
    if not found:
        raise RegistrationError(f"{folder}: no file in this folder imports gaugeblock.conformance.implements")
    return found


def _files(folder: str) -> Iterator[Path]:
    """Python files by name; not those of hidden folders, nor of those where packages are installed."""
    for inside, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if each not in SKIPPED and not each.startswith("."))
        if "pyvenv.cfg" in files:
            folders.clear()
        yield from (Path(inside) / each for each in sorted(files) if each.endswith(".py"))


def imports_implements(path: Path) -> bool:
    """Whether a file imports what registers."""
    text = path.read_bytes()
    if b"gaugeblock" not in text:
        return False
    read = told(text)
    for name, _, wanted in read.imports:
        if name == "gaugeblock.conformance" and (not wanted or {"implements", "*"} & {*wanted}):
            return True
        if name == "gaugeblock" and "conformance" in wanted:
            return True
    return read.hides and b"implements" in text  # it cannot be read, or puts names together: whoever runs it will tell
