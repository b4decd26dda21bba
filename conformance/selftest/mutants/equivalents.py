"""Mutants that are right too: listed with the reason in `equivalents.toml`, and checked there and back.

An entry names no line number: a module, a function, the rule, the text of the line, and what becomes of what in it.
"""

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from gaugeblock.conformance.selftest.mutants.judging import Outcome
from gaugeblock.conformance.selftest.mutants.sources import Mutant, source_of

FILE = Path(__file__).with_name("equivalents.toml")


@dataclass(frozen=True, kw_only=True)
class Equivalent:
    """One change that no property can see, or several of one line."""

    module: str
    """Without `gaugeblock.`."""
    function: str
    """In which it stands; empty for the module itself."""
    line: str
    """Its text, as `Mutant.text`."""
    changes: tuple[str, ...]
    """As `rule: before -> after`."""
    reason: str
    """Why it is right, in a sentence."""

    def is_about(self, mutant: Mutant) -> bool:
        """Whether it lists this mutant."""
        place = mutant.module.removeprefix("gaugeblock."), mutant.function, mutant.text
        return place == (self.module, self.function, self.line) and change_of(mutant) in self.changes

    def __str__(self) -> str:
        return f"{self.module} ({self.function}), {self.line!r}"


def change_of(mutant: Mutant) -> str:
    """A mutant's change as entries tell it."""
    return f"{mutant.rule}: {mutant.change}"


def load_equivalents(file: Path = FILE) -> tuple[Equivalent, ...]:
    """The entries of a file.

    Raises:
        ValueError: If one lacks something, or has what none has.
    """
    entries = tomllib.loads(file.read_text()).get("equivalent", [])
    names = {each.name for each in fields(Equivalent)}
    for number, entry in enumerate(entries):
        if set(entry) != names or not entry["reason"] or not entry["changes"]:
            expected, got = ", ".join(sorted(names)), ", ".join(sorted(entry))
            raise ValueError(f"{file.name}: entry {number + 1} must have {expected}, got {got}")
    return tuple(Equivalent(**entry | {"changes": tuple(entry["changes"])}) for entry in entries)


def is_listed(listed: Iterable[Equivalent], mutant: Mutant) -> bool:
    """Whether an entry is about it."""
    return any(each.is_about(mutant) for each in listed)


def wrong(listed: Iterable[Equivalent], outcomes: Sequence[Outcome]) -> list[str]:
    """Entries of which a mutant was killed."""
    return [
        f"listed as equivalent, but killed by {outcome.killed_by}: {outcome.mutant}"
        for each in listed
        for outcome in outcomes
        if outcome.killed_by and each.is_about(outcome.mutant)
    ]


def stale(listed: Iterable[Equivalent]) -> list[str]:
    """Changes that are listed and that no rule makes any more."""
    return [
        f"listed as equivalent, but made by no rule: {each}: {change}"
        for each in listed
        for change in each.changes
        if (each.function, each.line, change) not in _made(each.module)
    ]


@cache
def _made(module: str) -> frozenset[tuple[str, str, str]]:
    """In which function, in which line, and how the rules change a module."""
    return frozenset((each.function, each.text, change_of(each)) for each in source_of(f"gaugeblock.{module}").mutants)
