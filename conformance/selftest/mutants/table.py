"""What came of mutants: how many were killed by which property, and those that survived."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from gaugeblock.conformance.selftest.mutants.equivalents import Equivalent, is_listed
from gaugeblock.conformance.selftest.mutants.judging import Outcome


def survivors(outcomes: Iterable[Outcome], listed: Iterable[Equivalent]) -> list[Outcome]:
    """Those that no property saw and no entry explains, and those of which nothing is known."""
    return [each for each in outcomes if not each.killed_by and (each.unsound or not is_listed(listed, each.mutant))]


def print_outcomes(
    outcomes: Sequence[Outcome], listed: Sequence[Equivalent], remarks: Sequence[str], seconds: float, console: Console
) -> None:
    """A row for each contract, a row for each property, then every survivor and every remark."""
    rows = summary(outcomes, listed)
    counts = Table(Column("contract", overflow="fold"), *list(next(iter(rows.values()), {})), title="mutants")
    for name, row in rows.items():
        counts.add_row(name, *(f"{each:g}" for each in row.values()), end_section=name == list(rows)[-2])
    console.print(counts)
    killers = Table("killed by", "mutants", "by a wrong result", "by an error")
    for name, count in Counter(each.killed_by for each in outcomes if each.killed_by).most_common():
        raised = sum(each.killed_by == name and each.reason.startswith("raised") for each in outcomes)
        killers.add_row(name, str(count), str(count - raised), str(raised))
    console.print(killers)
    for each in survivors(outcomes, listed):
        what = f"not known ({each.unsound})" if each.unsound else "survives"
        console.print(f"{what}: {each.contract} ({each.implementation}) {each.mutant}", style="bold red", markup=False)
    for remark in remarks:
        console.print(remark, style="bold red", markup=False)
    console.print(f"{len(outcomes):,} mutants, {seconds:.0f} s")


def summary(outcomes: Sequence[Outcome], listed: Sequence[Equivalent]) -> dict[str, dict[str, int]]:
    """Counts by contract, and of all."""
    alive = survivors(outcomes, listed)
    rows = {}
    for name in [*dict.fromkeys(each.contract for each in outcomes), "all"]:
        own = [each for each in outcomes if name in (each.contract, "all")]
        rows[name] = {
            "mutants": len(own),
            "killed": sum(bool(each.killed_by) for each in own),
            "in float32 alone": sum(bool(each.killed_by) and each.is_easier for each in own),
            "equivalent": sum(not each.killed_by and is_listed(listed, each.mutant) for each in own),
            "survive": sum(each in alive for each in own),
            "seconds": round(sum(each.seconds for each in own)),
        }
    return rows


def write_json(file: Path, outcomes: Sequence[Outcome], listed: Sequence[Equivalent], remarks: Sequence[str]) -> None:
    """All that is known of every mutant."""
    told: list[dict[str, Any]] = [asdict(each) | {"listed": is_listed(listed, each.mutant)} for each in outcomes]
    found = {"summary": summary(outcomes, listed), "remarks": list(remarks), "mutants": told}
    file.write_text(json.dumps(found, indent=1) + "\n")
