"""The command `gaugeblock bench`: a table for each workload and direction, fastest first."""

import argparse
import difflib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from tabulate import tabulate

from gaugeblock.conformance.bench.competitors import Competitor, competitors
from gaugeblock.conformance.bench.problem import (
    FULL,
    QUICK,
    Direction,
    Limits,
    Problem,
    Unavailable,
    make_problem,
    scaled,
)
from gaugeblock.conformance.bench.roofline import Machine, this_machine
from gaugeblock.conformance.bench.timing import Timing, keep_freed_memory, measure
from gaugeblock.conformance.contract import Contract, Workload
from gaugeblock.conformance.registry import contracts, find_contract, load_entry_points

MEASURED, WRONG_RESULTS, NOTHING_MEASURED = 0, 1, 3
DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "forward": ("forward",),
    "backward": ("backward",),
    "both": ("forward", "backward"),
}
TITLES = {"forward": "forward", "backward": "forward + backward"}
HEADERS = ("implementation", "× roofline", "ms", "best ms", "TFLOP/s", "GB/s", "deviation", "samples", "")
COLUMNS = ("left", *["right"] * 7, "left")
LONGEST_REASON = 100  # characters


@dataclass(frozen=True)
class Effort:
    """How much a bench may cost: the size of problems on the CPU, and seconds for each competitor."""

    limits: Limits
    seconds: float


@dataclass(frozen=True)
class Row:
    """One competitor on one workload; times in seconds, None where it did not take part.

    Attributes:
        scale: By which factors the workload was made smaller.
        roofline: Median time over roofline time: 1 is the machine's limit.
        deviation: From the reference's results (`Problem.deviation`).
        samples: Number of samples, and of those that other processes did not disturb.
        reason: Why it did not take part, or what is wrong with it.
    """

    contract: str
    workload: str
    scale: str
    direction: str
    implementation: str
    roofline: float | None = None
    median: float | None = None
    best: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    deviation: float | None = None
    samples: tuple[int, int] = (0, 0)
    reason: str = ""


def main(options: argparse.Namespace) -> int:
    """Prints the tables that the options ask for.

    Returns:
        0; 1 if a competitor's results are wrong; 3 if nothing was measured.

    Raises:
        ValueError: If a contract or workload is unknown.
    """
    load_entry_points()
    effort = Effort(QUICK, 0.3) if options.quick else Effort(FULL, 3.0)
    selected = list(select(options.contract, options.workload))
    machine = this_machine()
    print(machine.name)
    print(f"ceilings: {machine.flops / 1e9:.0f} GFLOP/s ({machine.dtype}), {machine.bytes / 1e9:.1f} GB/s")
    if keep_freed_memory():
        print("malloc keeps freed memory: page faults of fresh memory are not timed")

    rows: list[Row] = []
    for contract, workload in selected:
        for direction in DIRECTIONS[options.direction]:
            table = bench(contract, workload, direction, competitors(contract), machine, effort)
            print(f"\n{contract.name}, {workload.name} ({table[0].scale}), {TITLES[direction]}")
            print(render(table))
            rows += table
    if options.json:
        document = {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1))
    return exit_status(rows)


def select(
    contract_names: Sequence[str], workload_names: Sequence[str]
) -> Iterator[tuple[Contract, Workload]]:
    """The workloads asked for; no name asks for all.

    Raises:
        ValueError: If a name is unknown; the nearest is suggested.
    """
    chosen = [find_contract(name) for name in contract_names] or list(contracts().values())
    known = {workload.name for contract in chosen for workload in contract.workloads}
    for name in workload_names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"unknown workload {name!r}; {hint}")
    for contract in chosen:
        for workload in contract.workloads:
            if not workload_names or workload.name in workload_names:
                yield contract, workload


def bench(
    contract: Contract,
    workload: Workload,
    direction: Direction,
    competing: Iterable[Competitor],
    machine: Machine,
    effort: Effort,
) -> list[Row]:
    """Lets all competitors run one workload, checks their results, and times them in turn.

    Returns:
        A row for every competitor: those measured, fastest first, then the others.
    """
    parameters, scale = workload.parameters, "full size"
    if machine.device == "cpu":
        parameters, scale = scaled(contract, workload, effort.limits, machine.dtype)
    problem = make_problem(contract, parameters, direction, machine)
    expected = problem.expected()
    # half of the digits must be right: what is timed is the operation; its precision is the gate's business
    tolerated = math.sqrt(torch.finfo(getattr(torch, machine.dtype)).eps)

    calls: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for each in competing:
        row = Row(contract.name, workload.name, scale, direction, each.name)
        try:
            call = each.prepare(problem)
            deviation = problem.deviation(call(), expected)
        except Exception as error:
            rows[each.name] = replace(row, reason=_one_line(error))
            continue
        wrong = "" if deviation <= tolerated else f"WRONG: deviates by more than {tolerated:.0e}"
        rows[each.name] = replace(row, deviation=deviation, reason=wrong)
        if not wrong:
            calls[each.name] = call
    del expected
    for name, timing in measure(calls, machine.device, effort.seconds).items():
        rows[name] = _with_times(rows[name], timing, problem, machine)
    return sorted(rows.values(), key=lambda row: math.inf if row.roofline is None else row.roofline)


def exit_status(rows: Iterable[Row]) -> int:
    """0 if all that was measured was right."""
    rows = list(rows)
    if any(row.deviation is not None and row.median is None for row in rows):
        return WRONG_RESULTS
    return MEASURED if any(row.median is not None for row in rows) else NOTHING_MEASURED


def render(rows: Iterable[Row]) -> str:
    """The table as text; what did not take part stands below, with the reason."""
    return tabulate([_cells(row) for row in rows], headers=HEADERS, disable_numparse=True, colalign=COLUMNS)


def _with_times(row: Row, timing: Timing, problem: Problem, machine: Machine) -> Row:
    return replace(
        row,
        roofline=timing.median / machine.seconds(problem.cost),
        median=timing.median,
        best=timing.best,
        flops_per_second=problem.cost.flops / timing.median,
        bytes_per_second=problem.cost.bytes / timing.median,
        samples=(timing.samples, timing.quiet),
    )


def _cells(row: Row) -> list[str]:
    taken, quiet = row.samples
    numbers = [
        _number(row.roofline, 1, ".2f"),
        _number(row.median, 1e3, ".3g"),
        _number(row.best, 1e3, ".3g"),
        _number(row.flops_per_second, 1e-12, ".3f"),
        _number(row.bytes_per_second, 1e-9, ".1f"),
        _number(row.deviation, 1, ".0e"),
        "" if not taken else str(taken) if taken == quiet else f"{taken}, {quiet} quiet",
    ]
    return [row.implementation, *numbers, row.reason]


def _number(value: float | None, unit: float, form: str) -> str:
    return "" if value is None else format(value * unit, form)


def _one_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, Unavailable):
        return text
    if isinstance(error, ImportError):
        return f"not installed: {text}"
    return f"{type(error).__name__}: {text}"[:LONGEST_REASON]
