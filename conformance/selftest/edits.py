"""Bugs planted into the text of our own implementations, which proves that what we ship is guarded: `planted/{realm}_*.py`, of
`triton`, `compiled`, `distributed` and `jax`.

Not there, since nobody could see them: `other=` of loads whose lanes are masked again later (router logits and bias), the row
mask of a store that writes the last row again with the same value, and the key of NaN (its bits are the largest integer anyway).
"""

import ast
import importlib
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.selftest.fault import Fault, Kind, plant

OPTIMIZED = "gaugeblock.optimized"
IMPORTS = re.compile(rf"^from {re.escape(OPTIMIZED)} import (\([^)]*\)|.+)$", re.MULTILINE)
COMPOSITION = "_composition.py"  # how the modules of OPTIMIZED end that models in torch are composed in: copied beside a realm's


def mutated(source: str, place: str, old: str, new: str) -> str:
    """The text of a module in which `old` is `new` wherever it occurs inside the function or constant `place`.

    Raises:
        ValueError: If there is no such place, or `old` does not occur there: the kernel has changed, and so must the mutant.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node
        if place in (getattr(target, "name", None), getattr(target, "id", None)):
            assert node.end_lineno is not None  # ast.parse sets it
            inside = "".join(lines[node.lineno - 1 : node.end_lineno])
            if old in inside:
                return "".join((*lines[: node.lineno - 1], inside.replace(old, new), *lines[node.end_lineno :]))
    raise ValueError(f"no {old!r} in {place}")


def load_mutant(realm: str, function: str, name: str, place: str, old: str, new: str) -> Callable[..., Any]:
    """A function from a copy of what a realm has, with one change of the text.

    Args:
        realm: A package of `optimized`: `triton`, `compiled`, `distributed` or `jax`.
        function: `module.function`, as in `routers.softmax_topk`.
        name: Of the copy.
        place: `module.function` or `module.CONSTANT` where the text is changed.
    """
    module, _, attribute = function.partition(".")
    package, original = f"gaugeblock_mutant_{realm}_{module}_{name.replace('-', '_')}", f"{OPTIMIZED}.{realm}"
    folder = _folder() / package
    if not folder.exists():
        folder.mkdir()
        texts = {name_of_file: file.read_text() for name_of_file, file in _sources(realm).items()} | _change(
            realm, place, old, new
        )
        for name_of_file, text in texts.items():
            text = IMPORTS.sub(partial(_with_own_compositions, package), text)
            (folder / name_of_file).write_text(text.replace(original, package))
    return getattr(importlib.import_module(f"{package}.{module}"), attribute)


def _sources(realm: str) -> dict[str, Traversable]:
    """What a realm is made of, by names of files; it may have a composition of its own, as JAX has."""
    compositions = {each.name: each for each in files(OPTIMIZED).iterdir() if each.name.endswith(COMPOSITION)}
    return compositions | {each.name: each for each in files(f"{OPTIMIZED}.{realm}").iterdir() if each.name.endswith(".py")}


def _change(realm: str, place: str, old: str, new: str) -> dict[str, str]:
    """The one file that is changed, by its name."""
    module, _, inside = place.partition(".")
    return {f"{module}.py": mutated(_sources(realm)[f"{module}.py"].read_text(), inside, old, new)}


def _with_own_compositions(package: str, statement: re.Match[str]) -> str:
    """What is imported of OPTIMIZED, one by one, with compositions of a package."""
    modules = [each.strip() for each in statement[1].strip("()").split(",") if each.strip()]
    own = {each for each in modules if f"{each.split()[0]}.py".endswith(COMPOSITION)}
    return "\n".join(f"from {package if each in own else OPTIMIZED} import {each}" for each in modules)


@dataclass(frozen=True)
class OfRanks:
    """A mutant that each rank makes in its own process."""

    realm: str
    function: str
    name: str
    place: str
    old: str
    new: str

    def __post_init__(self) -> None:
        _change(self.realm, self.place, self.old, self.new)  # a place that is gone is told here, not taken for a bug in ranks

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        return load_mutant(**vars(self))(*inputs, **options)


@cache
def _folder() -> Path:
    """A folder for the copies, on the import path: Triton reads a kernel's text from its file."""
    _folders.append(tempfile.TemporaryDirectory(prefix="gaugeblock-mutants-"))
    sys.path.insert(0, _folders[0].name)
    return Path(_folders[0].name)


_folders: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def mutant(
    contract: str,
    name: str,
    summary: str,
    place: str,
    old: str,
    new: str,
    caught_by: str,
    kind: Kind,
    source: str = "",
    implementation: str = "triton",
    **claims: Any,
) -> None:
    """Registers a change of text as a fault of one of a contract's implementations, with what this one claims to be."""
    (row,) = (each for each in find_contract(contract).implementations if each.name == implementation)
    realm, _, function = str(row.function).removeprefix(f"{OPTIMIZED}.").replace(":", ".").partition(".")
    make = OfRanks if row.world_sizes and row.framework == "torch" else load_mutant
    candidate = partial(make, realm, function, name, place, old, new)
    plant(
        Fault(
            name=f"{realm}-{name}",
            contract=contract,
            candidate=candidate,
            caught_by=caught_by,
            kind=kind,
            source=source,
            summary=summary,
            claims={"kind": row.kind, "framework": row.framework, "world_sizes": row.world_sizes} | claims,
        )
    )
