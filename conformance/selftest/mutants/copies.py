"""Copies of our modules in which one module is a mutant, made where they are called: in the candidate's process.

Copied are the changed module and those by which an implementation reaches it; all others are the genuine ones, and so is whatever
the judge has. `gaugeblock.conformance.selftest.mutants.copies:MODULE NUMBER ENTRY` is the import path of an implementation
`ENTRY` (`module:function`) over the change of that number of that module; a name of this module is made when it is asked for.
"""

import ast
import linecache
import sys
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from itertools import count
from types import ModuleType
from typing import Any

from gaugeblock.conformance.selftest.mutants.sources import Mutant, file_of, source_of

MUTABLE = ("gaugeblock.reference", "gaugeblock.optimized")
GENUINE = "gaugeblock.reference.configs"  # whose classes cases are made of
KEPT = 8  # mutants whose modules stay in memory: one is asked for many times, then never again
_kept: dict[str, "Copies"] = {}
_numbers = count()


def path_of(mutant: Mutant, entry: str) -> str:
    """The import path of an implementation that has the mutant's module for its own."""
    return f"{__name__}:{mutant.module} {mutant.number} {entry}"


def __getattr__(name: str) -> Any:
    if name.count(" ") != 2:
        raise AttributeError(name)
    if name not in _kept:
        while len(_kept) >= KEPT:
            _kept.pop(next(iter(_kept))).forget()
        module, number, entry = name.split(" ")
        _kept[name] = copies_with(module, source_of(module).text_of(int(number)), entry)
    start, _, attribute = name.split(" ")[-1].partition(":")
    return getattr(_kept[name].load(start), attribute)


def copies_with(module: str, text: str, entry: str) -> "Copies":
    """The modules through which an implementation is reached where one of them has another text.

    Raises:
        ImportError: If it does not reach that one.
    """
    copied = between(entry.partition(":")[0], module)
    if not copied:
        raise ImportError(f"{entry} does not import {module}")
    return Copies({each: "" for each in copied} | {module: text})


def between(start: str, end: str) -> Collection[str]:
    """The modules of ours by which one reaches another that it imports, itself among them."""
    return [each for each in reached(start) if end in reached(each)]


@cache
def reached(start: str) -> frozenset[str]:
    """All modules of ours that one imports, itself among them."""
    found, waiting = {start}, [start]
    while waiting:
        new = imported_by(waiting.pop()) - found
        found |= new
        waiting += new
    return frozenset(found)


@cache
def imported_by(module: str) -> frozenset[str]:
    """The modules of ours that a module's text imports, wherever in it."""
    statements = [each for each in ast.walk(ast.parse(file_of(module).read_text())) if isinstance(each, ast.ImportFrom)]
    pairs = [(str(each.module), alias.name) for each in statements for alias in each.names]
    found = {_source_of_name(*pair) for pair in pairs if pair[0].startswith(MUTABLE)}
    return frozenset(found - {GENUINE, *MUTABLE})


@cache
def _source_of_name(module: str, name: str) -> str:
    """The module that `from module import name` gives, or takes the name from."""
    inner = f"{module}.{name}"
    is_package = file_of(module).name == "__init__.py"
    return inner if is_package and find_spec(inner) is not None else module


class Copies:
    """Modules that are made once each, from other texts than the genuine ones.

    Args:
        texts: Of each by its name; an empty one is the genuine.
    """

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts, self.made, self.number = texts, dict[str, ModuleType](), next(_numbers)

    def load(self, name: str) -> ModuleType:
        """The copy of a module, or the genuine one."""
        if name not in self.texts:
            __import__(name)
            return sys.modules[name]
        if name not in self.made:
            self.made[name] = self._copy(name)
        return self.made[name]

    def _copy(self, name: str) -> ModuleType:
        tree = _Redirected(self.texts).visit(ast.parse(self.texts[name] or file_of(name).read_text()))
        text = ast.unparse(ast.fix_missing_locations(tree))
        file = f"/mutants/{self.number}/{name.replace('.', '/')}.py"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # Triton reads a kernel's text
        module = ModuleType(f"mutant_{self.number}_of_{name.replace('.', '_')}")
        module.__file__ = file
        vars(module)["_copies"] = self
        sys.modules[module.__name__] = module  # where dataclasses and Triton look for it
        exec(compile(text, file, "exec"), vars(module))
        return module

    def forget(self) -> None:
        """Lets go of all of them."""
        for module in self.made.values():
            linecache.cache.pop(str(module.__file__), None)
            sys.modules.pop(module.__name__, None)


class _Redirected(ast.NodeTransformer):
    """Imports of what is copied give the copies."""

    def __init__(self, copied: Collection[str]) -> None:
        self.copied = copied

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt]:
        """`from module import name` becomes `name = ...`, if either is a copy."""
        module, kept, others = str(node.module), list[ast.alias](), list[ast.stmt]()
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            given = f"_copies.load({inner!r})" if inner in self.copied else f"_copies.load({module!r}).{alias.name}"
            if inner in self.copied or module in self.copied:
                others += ast.parse(f"{alias.asname or alias.name} = {given}").body
            else:
                kept.append(alias)
        return [*([ast.ImportFrom(module, kept, 0)] if kept else []), *others]
