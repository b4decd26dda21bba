"""Two runs of the gate side by side: two commits, two devices, two releases of a framework."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gaugeblock.conformance.engine.judging.verdict import FAILED, Verdict
from gaugeblock.conformance.report.files import FORMAT
from gaugeblock.conformance.report.view import MARKS, printable, units

# What is worth a reader's eye, not what is right: the same cases on the same machine give the same statistics.
NOTABLE_RATIO, NOTABLE_CHANGE = 1.25, 0.05
SHOWN = 40  # lines of each kind


@dataclass(frozen=True)
class Change:
    """A verdict in both runs."""

    before: Verdict
    after: Verdict


@dataclass(frozen=True)
class Drift:
    """A statistic that moved, in units of its limit."""

    identity: str
    output: str
    statistic: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before if self.before else math.inf


@dataclass(frozen=True)
class ChangedBits:
    """How many of the cases that both runs judged gave other bits, and one of them."""

    identity: str
    changed: int
    compared: int
    case: str


@dataclass(frozen=True)
class Comparison:
    """What differs between two runs."""

    newly_failing: list[Verdict]
    """Fails now; passed, was not supported or was not there before (`appeared` holds those too)."""
    newly_passing: list[Verdict]
    """Failed, was waived or not supported before, and passes now."""
    restated: list[Change]
    """Other changes of status, e.g. a pass that is no longer tested."""
    appeared: list[Verdict]
    disappeared: list[Verdict]
    """Verdicts of only one run."""
    drifts: list[Drift]
    """Notable changes of statistics, the largest first."""
    changed_bits: list[ChangedBits]
    """Verdicts with a case whose outputs are not the same bit for bit."""
    compared: int
    compared_cases: int
    """How many verdicts, and cases with a digest of their bits, both runs hold."""

    @property
    def exit_status(self) -> int:
        """1 if something newly fails, else 0."""
        return 1 if self.newly_failing else 0


def load_run(path: Path) -> dict[str, Any]:
    """Reads a `gaugeblock.json`.

    Raises:
        ValueError: If it is not one; one line names the file.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(run, dict) or "verdicts" not in run:
        raise ValueError(f"{path}: not a gaugeblock.json, which `gaugeblock check --report DIR` writes")
    if run.get("format") != FORMAT:
        raise ValueError(f"{path}: format {run.get('format')!r}, expected {FORMAT}")
    try:
        _verdicts(run)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a verdict: {type(error).__name__}: {error}") from None
    return run


def compare(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    """Compares run `a` (before) with run `b` (after), both from `load_run`.

    Verdicts are matched by identity; if each run has one device and these differ, without the device.
    """
    before, after = _verdicts(a), _verdicts(b)
    devices = [{each.device for each in run} for run in (before, after)]
    if all(len(found) == 1 for found in devices) and devices[0] != devices[1]:
        before, after = ([replace(each, device="any device") for each in run] for run in (before, after))
    old, new = ({each.identity: each for each in run} for run in (before, after))
    changes = [Change(old[identity], each) for identity, each in new.items() if identity in old]
    restated = [each for each in changes if each.before.status != each.after.status]
    failing = [each for identity, each in new.items() if each.status in FAILED and not _failed(old.get(identity))]
    passing = [each for each in restated if _passes(each.after) and not _passes(each.before)]
    told = {each.identity for each in failing} | {each.after.identity for each in passing}
    drifts = [drift for each in changes for drift in _drifts(each)]
    return Comparison(
        newly_failing=failing,
        newly_passing=[each.after for each in passing],
        restated=[each for each in restated if each.after.identity not in told],
        appeared=[each for identity, each in new.items() if identity not in old],
        disappeared=[each for identity, each in old.items() if identity not in new],
        drifts=sorted(drifts, key=lambda each: -abs(math.log(max(each.ratio, 1e-9)))),
        changed_bits=[bits for each in changes if (bits := _changed_bits(each)) is not None],
        compared=len(changes),
        compared_cases=sum(len(_common_cases(each)) for each in changes),
    )


def _verdicts(run: dict[str, Any]) -> list[Verdict]:
    return [Verdict.from_json(each) for each in run["verdicts"]]


def _failed(verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.status in FAILED


def _passes(verdict: Verdict) -> bool:
    return verdict.status in ("pass", "warning")


def _drifts(change: Change) -> Iterator[Drift]:
    for output, after in change.after.statistics.items():
        before = change.before.statistics.get(output)
        for name in ("max", "rms", "bias"):
            old, new = getattr(before, name, None), getattr(after, name)
            if old is None or new is None or old == new:
                continue
            drift = Drift(change.after.identity, output, name, old, new)
            if abs(new - old) >= NOTABLE_CHANGE and not 1 / NOTABLE_RATIO < drift.ratio < NOTABLE_RATIO:
                yield drift


def _changed_bits(change: Change) -> ChangedBits | None:
    common = _common_cases(change)
    changed = [case for case in common if change.before.fingerprints[case] != change.after.fingerprints[case]]
    return ChangedBits(change.after.identity, len(changed), len(common), min(changed, key=len)) if changed else None


def _common_cases(change: Change) -> list[str]:
    return [case for case in change.after.fingerprints if case in change.before.fingerprints]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints what differs, the worst first, and a closing line."""
    _print_list("newly failing", "bold red", [_line(each) for each in comparison.newly_failing], console)
    _print_list("newly passing", "green", [_line(each) for each in comparison.newly_passing], console)
    restated = [f"{each.after.identity}: {each.before.status} → {each.after.status}" for each in comparison.restated]
    _print_list("other changes of status", "yellow", restated, console)
    _print_list("no longer there", "yellow", [each.identity for each in comparison.disappeared], console)
    appeared = [_line(each) for each in comparison.appeared if each.status not in FAILED]
    _print_list("new", "", appeared, console)
    bits = [f"{each.identity}: {each.changed} of {each.compared} cases, e.g. {each.case}" for each in comparison.changed_bits]
    _print_list("bits changed", "", bits, console)
    _print_drifts(comparison.drifts, console)
    console.print(_closing_line(comparison))


def _line(verdict: Verdict) -> str:
    return f"{MARKS[verdict.status]} {verdict.identity}" + (f": {verdict.reason}" if verdict.reason else "")


def _print_list(title: str, style: str, lines: Sequence[str], console: Console) -> None:
    if not lines:
        return
    console.print(Text(f"{title} ({len(lines)})", style or "bold"))
    for line in lines[:SHOWN]:
        console.print(Text(f"  {printable(line)}"))
    if len(lines) > SHOWN:
        console.print(f"  ... and {len(lines) - SHOWN} more")
    console.print()


def _print_drifts(drifts: Sequence[Drift], console: Console) -> None:
    if not drifts:
        return
    console.print(Text(f"drift of statistics, in units of their limits ({len(drifts)})", "bold"))
    table = Table("verdict", "output", "statistic", box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for heading in ("before", "after", "ratio"):
        table.add_column(heading, justify="right")
    for each in drifts[:SHOWN]:
        numbers = (units(each.before), units(each.after), f"×{units(each.ratio)}")
        table.add_row(*(Text(printable(text)) for text in (each.identity, each.output, each.statistic, *numbers)))
    console.print(table)
    if len(drifts) > SHOWN:
        console.print(f"  ... and {len(drifts) - SHOWN} more")
    console.print()


def _closing_line(comparison: Comparison) -> Text:
    failing = len(comparison.newly_failing)
    result = (f"{failing} newly failing", "bold red") if failing else ("nothing newly fails", "bold green")
    changed = sum(each.changed for each in comparison.changed_bits)
    bits = (
        f"bits changed in {changed} of {comparison.compared_cases} cases" if comparison.compared_cases else "no bits to compare"
    )
    compared = f"{comparison.compared} verdicts compared"
    return Text.assemble(result, f", {len(comparison.newly_passing)} newly passing, {bits}; {compared}")
