"""What candidates register, told by a process of their own: none of their code runs in the judge's."""

import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil

from gaugeblock.conformance.engine.devices import available_devices
from gaugeblock.conformance.engine.folders import files_of
from gaugeblock.conformance.engine.implementation import Candidate, Implementation
from gaugeblock.conformance.engine.processes.handle import EngineError, Lost, Process
from gaugeblock.conformance.engine.processes.messages import Describe
from gaugeblock.conformance.engine.registry import ENTRY_POINTS, RegistrationError, register_told, registers_nothing

MOST_CHARACTERS = 500  # of what is said of a file


def describe_candidates(sources: tuple[str, ...]) -> list[Implementation]:
    """What files, modules and the files of folders register, or, without any, installed packages.

    Raises:
        RegistrationError: If one cannot be read, run or imported, or registers nothing; one line says where and why.
    """
    if not sources:
        return _described(Describe(())) if entry_points(group=ENTRY_POINTS) else []
    inside = {each: files_of(each) for each in sources if os.path.isdir(each)}
    files = tuple(dict.fromkeys(file for each in sources for file in inside.get(each, (each,))))
    optional = frozenset(file for found in inside.values() for file in found) - {*sources}
    together: dict[str, list[str]] = {}  # files that lie side by side have the same neighbours, others need not
    for each in files:
        together.setdefault(os.path.dirname(each) if each.endswith(".py") else "", []).append(each)
    asked = [Describe(tuple(group), optional, frozenset(files) - {*group}) for group in together.values()]
    found = [row for each in asked for row in _described(each)]
    for folder, below in inside.items():
        registering = {each.function.source for each in found if isinstance(each.function, Candidate)}
        if not registering & {str(Path(each).resolve()) for each in below}:
            raise registers_nothing(folder)
    return found


def _described(asked: Describe) -> list[Implementation]:
    """What sources register that are loaded in one process."""
    sources = asked.sources
    process = Process("cpu", _memory())
    try:
        told = process.describe(asked)
    except Lost as lost:
        printed = process.printed().strip().splitlines()
        last = f": {printed[-1]}" if printed else ""
        raise RegistrationError(f"{', '.join(sources) or ENTRY_POINTS}: while it was imported, {lost.message}{last}") from None
    finally:
        process.stop()
    if "wrong" in told:
        raise RegistrationError((str(told["wrong"]).splitlines() or ["(no message)"])[0][:MOST_CHARACTERS])
    if "raised" in told:  # what is no Exception: KeyboardInterrupt
        raise RegistrationError(f"{', '.join(sources)}: while it was imported, it raised {str(told['raised'])[:MOST_CHARACTERS]}")
    if "engine_error" in told:
        raise EngineError(str(told["engine_error"]))
    try:
        _check_sources(told["rows"], sources)
        return [_row(each) for each in told["rows"]]
    except (KeyError, TypeError, AttributeError):
        raise RegistrationError(f"{', '.join(sources)}: what it registers cannot be read") from None


def _check_sources(rows: list[dict[str, Any]], sources: tuple[str, ...]) -> None:
    """What is told of a file is told by it: the verdict would be another's."""
    given = {str(Path(each).resolve()) if each.endswith(".py") else each for each in sources}
    given = given or {each.module for each in entry_points(group=ENTRY_POINTS)}
    for each in rows:
        if each["source"] not in given:
            raise RegistrationError(f"{', '.join(sources)}: it speaks of an implementation in {str(each['source'])[:200]!r}")


def _memory() -> int | None:
    """Bytes of address space for files whose claims are not known yet; without limit where a driver takes what it likes."""
    return None if len(available_devices()) > 1 else max(8 << 30, psutil.virtual_memory().total // 2)


def _row(told: dict[str, Any]) -> Implementation:
    return register_told(str(told["contract"]), str(told["name"]), str(told["source"]), dict(told["claims"]))
