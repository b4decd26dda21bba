"""`gaugeblock merge`: the reports of several machines as one."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gaugeblock.conformance.engine.judging.verdict import Verdict, exit_status
from gaugeblock.conformance.exit_status import CONFORM, NOTHING_TESTED, WRONG_CALL
from gaugeblock.conformance.report import files, terminal, view
from gaugeblock.conformance.report.compare import load_run

Run = dict[str, Any]


def run_merge(options: argparse.Namespace) -> int:
    """Writes the report of the whole, and returns its exit status; 2 if shards are missing.

    Raises:
        ValueError: If the reports do not belong together.
    """
    runs = [load_run(folder / "gaugeblock.json") for folder in options.reports]
    verdicts, missing = merge(runs, options.reports)
    environment = merged_environment(runs, missing)
    console = Console(highlight=False)
    files.write_report(options.report, verdicts, environment, runs[0]["profile"], _sources(verdicts, options.reports))
    terminal.print_matrix(verdicts, console, folder=options.report)
    console.print(f"report: {options.report / 'index.html'}", markup=False)
    if missing:
        of = _shard(runs[0])["of"]
        console.print(f"missing: shard {', '.join(map(str, missing))} of {of}", style="bold red", markup=False)
        return WRONG_CALL
    status = exit_status(verdicts)
    return CONFORM if status == NOTHING_TESTED and _is_untouched(runs) else status


def merge(runs: Sequence[Run], folders: Sequence[Path]) -> tuple[list[Verdict], list[int]]:
    """All verdicts in the order of the whole, and the numbers of the shards that are missing.

    Raises:
        ValueError: If two of the runs are of different code or profiles, parts of different wholes, or have verdicts in common.
    """
    for run, folder in zip(runs, folders, strict=True):
        _check_alike(runs[0], run, folders[0], folder)
    where: dict[str, Path] = {}
    placed: list[tuple[int, Verdict]] = []
    for run, folder in zip(runs, folders, strict=True):
        shard = _shard(run)
        verdicts = [Verdict.from_json(each) for each in run["verdicts"]]
        positions = shard["positions"] if shard else range(len(placed), len(placed) + len(verdicts))
        if len(positions) != len(verdicts):
            raise ValueError(f"{folder}: {len(verdicts)} verdicts, but the shard has {len(positions)}")
        for position, verdict in zip(positions, verdicts, strict=True):
            if verdict.identity in where:
                raise ValueError(f"{where[verdict.identity]} and {folder} both have a verdict on {verdict.identity}")
            where[verdict.identity] = folder
            placed.append((position, verdict))
    placed.sort(key=lambda each: each[0])
    return [verdict for _, verdict in placed], _missing(runs, [position for position, _ in placed])


def _check_alike(first: Run, other: Run, its_folder: Path, folder: Path) -> None:
    """That two runs are of the same code, by the same rules, and parts of the same whole."""
    facts: list[tuple[str, Any, Any]] = [
        (name, of(first), of(other))
        for name, of in (
            ("gaugeblock", lambda run: run["gaugeblock"]),
            ("profile", lambda run: run["profile"]),
            ("commit", lambda run: (run["environment"].get("git") or {}).get("commit", "")),
            ("number of shards", lambda run: (_shard(run) or {}).get("of", "none")),
            ("number of verdicts", lambda run: (_shard(run) or {}).get("total", "none")),
            ("--since", lambda run: (run["environment"].get("part", {}).get("since") or {}).get("commit", "none")),
        )
    ]
    for name, expected, found in facts:
        if expected != found:
            raise ValueError(f"{its_folder} has {name} {expected!r}, and {folder} {found!r}: they do not belong together")


def _missing(runs: Sequence[Run], positions: Sequence[int]) -> list[int]:
    shards = [shard for run in runs if (shard := _shard(run))]
    if not shards:
        return []
    missing = sorted({*range(1, shards[0]["of"] + 1)} - {each["number"] for each in shards})
    whole = {*range(shards[0]["total"])}
    if len({*positions}) < len(positions) or not {*positions} <= whole or (not missing and len(positions) < len(whole)):
        raise ValueError("the shards are not parts of one whole: their verdicts do not add up to it")
    return missing


def _shard(run: Run) -> Any:
    return run["environment"].get("part", {}).get("shard")


def _is_untouched(runs: Sequence[Run]) -> bool:
    """Whether nothing was to be judged, since a change touches nothing."""
    since = runs[0]["environment"].get("part", {}).get("since")
    return since is not None and not since["touched"]


def merged_environment(runs: Sequence[Run], missing: Sequence[int]) -> dict[str, Any]:
    """Where the runs took place: what is the same of all, and the different things side by side."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for run in runs for name in run["environment"]):
        values = [run["environment"][name] for run in runs if name in run["environment"]]
        different = [each for number, each in enumerate(values) if each not in values[:number]]
        texts = all(isinstance(each, str) for each in different)
        merged[name] = "; ".join(different) if texts and name != "time" else max(values) if name == "time" else values[0]
    part = {"since": since} if (since := merged.get("part", {}).get("since")) else {}
    merged["part"] = part | {"merged": len(runs), "missing": list(missing)}
    return merged


def _sources(verdicts: Sequence[Verdict], folders: Sequence[Path]) -> dict[tuple[str, str], str | None]:
    """What registered the implementations that fail, as the failures' own files say."""
    found: dict[tuple[str, str], str | None] = {}
    for verdict in verdicts:
        for folder in folders if verdict.failure else ():
            path = folder / "failures" / f"{view.slug(verdict)}.json"
            if path.is_file():
                found[verdict.contract, verdict.implementation] = json.loads(path.read_text(encoding="utf-8"))["source"]
    return found
