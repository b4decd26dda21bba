"""`gaugeblock selftest`: how good the suite itself is, in five rates, beside what plain tests reach on the same cases."""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gaugeblock.conformance.engine.processes.workers import Died, run_tasks
from gaugeblock.conformance.exit_status import CONFORM, FAILS
from gaugeblock.conformance.report.tables import print_columns

os.environ.setdefault("TRITON_INTERPRET", "1")  # faults are planted for the CPU, on a machine with a GPU too


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    shrink_seconds: float
    """For each planted bug."""
    examples: int
    """Cases for each regime and dtype, judged for every right variant."""
    trivial_examples: int
    """The same for trivial candidates."""
    scripts: int | None
    """Reproductions run again; None for all."""
    corners: int = 200
    """Right kernels that are wrong in one class of cases, or in one pair of classes."""
    whole_gates: bool = False
    """Whether lost candidates are put through every property too, against the clock."""


EXTENTS = {
    "quick": Extent(shrink_seconds=1, examples=4, trivial_examples=4, scripts=8, corners=52),
    "ci": Extent(shrink_seconds=4, examples=18, trivial_examples=20, scripts=None),
    "thorough": Extent(shrink_seconds=20, examples=300, trivial_examples=100, scripts=None, whole_gates=True),
}
Task = tuple[Any, ...]


def run_selftest(options: argparse.Namespace) -> int:
    """Measures the five rates, prints them, and writes them to a file if one is named; 0 if they are what they should be.

    Args:
        options: `profile`: a key of `EXTENTS`; `json`: a path or None; `rate`: "all", or "variants" for that one alone.
    """
    start, console = time.monotonic(), Console(highlight=False)
    extent = EXTENTS[options.profile]
    if options.rate == "variants":
        return measure_variants(options, console)
    results = measure(tasks_of(extent), options.profile, console)
    kills = results["kill"]
    variants, trivial = (sum(results[kind][1:], results[kind][0]) for kind in ("variants", "trivial"))
    rates = summarize(kills, variants, trivial) | {"corners": summarize_corners(results["corner"])}
    rates["reproduction"] = reproduce(kills, extent.scripts, console)
    rates["hostile"] = hostile_rate(results["hostile"], extent.whole_gates)
    rates["profile"], rates["seconds"] = options.profile, round(time.monotonic() - start, 1)
    print_rates(rates, kills, console)
    if options.json:
        caught = [asdict(each) | {"script": ""} for each in kills]
        options.json.write_text(json.dumps(rates | {"faults": caught}, indent=1) + "\n")
    return CONFORM if complaints(rates) == [] else FAILS


def measure_variants(options: argparse.Namespace, console: Console) -> int:
    """The second rate alone, as on another machine: how many judgements of right variants are rejections; 0 if none is."""
    every = tasks_of(EXTENTS[options.profile])
    groups = {name: [task for task in tasks if task[0] == "variants"] for name, tasks in every.items()}
    found = measure({name: tasks for name, tasks in groups.items() if tasks}, options.profile, console)["variants"]
    alarms = sum(found[1:], found[0])
    console.print(f"right variants rejected: {len(alarms.alarms)} of {alarms.judged:,} judgements")
    for each in alarms.alarms:
        console.print(f"  {each}", markup=False)
    if options.json:
        options.json.write_text(json.dumps({"judged": alarms.judged, "alarms": alarms.alarms}, indent=1) + "\n")
    return FAILS if alarms.alarms else CONFORM


def tasks_of(extent: Extent) -> dict[str, list[Task]]:
    """What is to be measured, in groups that share error budgets."""
    from gaugeblock.conformance.engine.registry import contracts
    from gaugeblock.conformance.selftest.corners import drawn_corners
    from gaugeblock.conformance.selftest.fault import faults
    from gaugeblock.conformance.selftest.hostile.table import files
    from gaugeblock.conformance.selftest.rates import RIGHT

    groups: dict[str, list[Task]] = defaultdict(list)
    for number, fault in enumerate(faults()):
        groups[f"{fault.contract}/{fault.caught_by}"].append(("kill", number))
    for corner in drawn_corners(RIGHT, extent.corners, seed=0):
        groups[f"{corner.contract}/corners"].append(("corner", corner))
    for name, contract in contracts().items():
        for regime in contract.regimes:
            for dtype in contract.dtypes:
                groups[f"{name}/{regime.name}/{dtype}"] += [
                    ("variants", name, regime.name, dtype, extent.examples),
                    ("trivial", name, regime.name, dtype, extent.trivial_examples),
                ]
    return groups | {f"hostile/{file}": [("hostile", file)] for file in files()}


def measure(groups: dict[str, list[Task]], profile: str, console: Console) -> dict[str, list[Any]]:
    """Runs all tasks in worker processes; results by the kind of task.

    Raises:
        RuntimeError: If a worker process died.
    """
    results: dict[str, list[Any]] = defaultdict(list)
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=sum(map(len, groups.values())))
        cores = len(os.sched_getaffinity(0))
        for task, result in run_tasks(groups, prepare, (profile,), workers=cores, seconds=1800):
            if isinstance(result, Died):
                raise RuntimeError(f"a worker process died while it measured {task}: exit code {result.exit_code}")
            results[task[0]].append(result)
            progress.advance(bar)
    return results


def prepare(profile_name: str) -> Callable[[Task], Any]:
    """Sets a worker process up; the returned function measures one thing."""
    from gaugeblock.conformance.engine.devices import keep_thread_count
    from gaugeblock.conformance.engine.exploration import PROFILES
    from gaugeblock.conformance.selftest import corners, rates
    from gaugeblock.conformance.selftest.fault import faults
    from gaugeblock.conformance.selftest.hostile import table

    keep_thread_count()
    warnings.filterwarnings("ignore", module="triton")  # its interpreter tells of infinities that cases hold on purpose
    quick = replace(PROFILES["quick"], shrink_seconds=EXTENTS[profile_name].shrink_seconds)

    def run(task: Task) -> Any:
        match task:
            case ("kill", number):
                return rates.kill(faults()[number], quick)
            case ("corner", corner):
                return corners.judge_corner(corner, rates.RIGHT)
            case ("variants", contract, regime, dtype, examples):
                visited = rates.landmark_cases(contract, regime) + rates.drawn_cases(contract, regime, examples, seed=1)
                return rates.judge_variants(contract, dtype, visited)
            case ("trivial", contract, regime, dtype, examples):
                return rates.judge_trivial(contract, dtype, rates.drawn_cases(contract, regime, examples, seed=2))
            case ("hostile", file):
                return [each.wrong for each in table.outcomes(file)]

    return run


def reproduce(kills: Sequence[Any], count: int | None, console: Console) -> dict[str, Any]:
    """Runs the printed scripts again, each in a fresh process: all, or as many of them evenly spread."""
    from gaugeblock.conformance.selftest.rates import fails_again

    killed = [each for each in kills if each.killed]
    step = max(1, len(killed) // count) if count else 1
    chosen = killed[::step]
    with (
        tempfile.TemporaryDirectory() as folder,
        console.status(f"running {len(chosen)} printed scripts again"),
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        again = list(pool.map(lambda each: fails_again(each.script, folder), chosen))
    quiet = [f"{each.contract} {each.name}" for each, failed in zip(chosen, again, strict=True) if not failed]
    return {"scripts": len(chosen), "fail_again": sum(again), "do_not": quiet}


def hostile_rate(wrong: Sequence[Sequence[str]], whole_gates: bool) -> dict[str, Any]:
    """How many hostile candidates ended in the expected verdict.

    Args:
        wrong: For each of them, by file, what is wrong with its verdict.
        whole_gates: Whether to measure what lost ones cost.
    """
    from gaugeblock.conformance.selftest.hostile.table import BUDGETED, HOSTILE, whole_gate

    found = [each for file in wrong for each in file]
    rows = {each.name: each for each in HOSTILE}
    dear = [whole_gate(rows[name], most) for name, most in BUDGETED] if whole_gates else []
    return {"candidates": len(found), "as_expected": found.count(""), "not": [each for each in [*found, *dear] if each]}


def summarize(kills: Sequence[Any], alarms: Any, vacuity: Any) -> dict[str, Any]:
    """The rates as plain data; `alarms` and `vacuity` are those of `rates`."""

    def of(rows: Sequence[Any]) -> dict[str, Any]:
        return {
            "faults": len(rows),
            "killed": sum(each.killed for each in rows),
            "median_examples": statistics.median(each.cases for each in rows),
            "most_examples": max(each.cases for each in rows),
            "plain": {name: sum(name in each.plain for each in rows) for name in alarms.plain},
        }

    def by(key: Callable[[Any], str]) -> dict[str, Any]:
        return {name: of([each for each in kills if key(each) == name]) for name in sorted({key(each) for each in kills})}

    known = [each.size / each.smallest for each in kills if each.killed and each.size and each.smallest]
    return {
        "kill": of(kills)
        | {
            "by_kind": by(lambda each: each.kind),
            "by_property": by(lambda each: each.property),
            "by_contract": by(lambda each: each.contract),
            "survivors": [f"{each.contract} {each.name} ({each.property})" for each in kills if not each.killed],
        },
        "false_alarms": {
            "judged": alarms.judged,
            "alarms": alarms.alarms,
            "at_most_with_95_percent": 3 / alarms.judged if not alarms.alarms else None,  # the rule of three
            "plain": alarms.plain,
        },
        "vacuity": asdict(vacuity),
        "shrinking": {
            "known_minima": len(known),
            "at_the_minimum": sum(ratio == 1 for ratio in known),
            "within_twice": sum(ratio <= 2 for ratio in known),
            "median_ratio": statistics.median(known) if known else None,
        },
    }


def summarize_corners(judged: Sequence[Any]) -> dict[str, Any]:
    """How many corner faults are caught, of one class and of a pair; those that are not."""
    by_strength = {
        name: [each for each in judged if len(each.corner.classes) == strength]
        for name, strength in (("classes", 1), ("pairs", 2))
    }
    return {
        "planted": {name: len(rows) for name, rows in by_strength.items()},
        "caught": {name: sum(each.caught for each in rows) for name, rows in by_strength.items()},
        "survivors": [str(each.corner) for each in judged if not each.caught],
    }


def complaints(rates: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    return [
        *(f"not caught: {each}" for each in rates["kill"]["survivors"]),
        *(f"not caught in a corner: {each}" for each in rates["corners"]["survivors"]),
        *(f"false alarm: {each}" for each in rates["false_alarms"]["alarms"]),
        *(f"passed though trivial: {each}" for each in rates["vacuity"]["passed"]),
        *(f"the script does not fail again: {each}" for each in rates["reproduction"]["do_not"]),
        *(f"hostile: {each}" for each in rates["hostile"]["not"]),
    ]


def print_rates(rates: dict[str, Any], kills: Sequence[Any], console: Console) -> None:
    """The five rates as tables, then every complaint."""
    kill, alarms, vacuity = rates["kill"], rates["false_alarms"], rates["vacuity"]
    plain = list(alarms["plain"])
    for title, rows in (("class of bug", kill["by_kind"]), ("property", kill["by_property"])):
        lines = []
        for name, row in [*rows.items(), ("all", kill)]:
            examples = row["faults"], row["killed"], row["median_examples"], row["most_examples"]
            lines.append([name, *(f"{each:g}" for each in (*examples, *(row["plain"][each] for each in plain)))])
        console.print(f"planted bugs, by {title}", style="bold")
        header = [title, "planted", "caught", "median examples", "most", *plain]
        print_columns(console, header, lines, right=range(1, len(header)))
        console.print()

    scripts, shrinking, hostile = rates["reproduction"], rates["shrinking"], rates["hostile"]
    caught = [kill["killed"], *(kill["plain"][each] for each in plain)]
    rejected = [len(alarms["alarms"]), *(alarms["plain"][each] for each in plain)]
    ours: dict[str, str] = {
        f"wrong by 1 % in one of the {name} of cases, caught":
            f"{rates['corners']['caught'][name] / max(1, planted):.0%} of {planted}"
        for name, planted in rates["corners"]["planted"].items()
    }  # fmt: skip
    ours["trivial results accepted"] = f"{len(vacuity['passed'])} of {vacuity['judged']:,}"
    ours["scripts that fail again"] = f"{scripts['fail_again']} of {scripts['scripts']}"
    ours["hostile candidates with the expected verdict"] = f"{hostile['as_expected']} of {hostile['candidates']}"
    console.print("five rates", style="bold")
    lines = [
        ["planted bugs caught", *(f"{each / kill['faults']:.0%} of {kill['faults']}" for each in caught)],
        ["right variants rejected", *(f"{each / alarms['judged']:.2%} of {alarms['judged']:,}" for each in rejected)],
        *([name, rate, *("" for _ in plain)] for name, rate in ours.items()),
    ]
    print_columns(console, ["rate", "gaugeblock", *plain], lines)
    console.print()
    bound = alarms["at_most_with_95_percent"]
    if bound:
        console.print(f"no false alarm in {alarms['judged']:,} judgements: fewer than {bound:.1e} each, with 95 % confidence")
    console.print(
        f"{vacuity['coincidences']:,} trivial results were the right ones: weights of 1 for all tokens, zeros that underflow"
    )
    console.print(
        f"shrunk cases: {shrinking['at_the_minimum']} of {shrinking['known_minima']} with a known smallest case are that case, "
        f"{shrinking['within_twice']} within twice its size"
    )
    kinds = Counter(each.kind for each in kills)
    console.print(f"{len(kills)} planted bugs of {len(kinds)} classes, {rates['seconds']:.0f} s")
    for complaint in complaints(rates):
        console.print(complaint, style="bold red", markup=False)
