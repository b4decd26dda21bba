"""What a bench finds out: a row of times for each workload and competitor, a row of counters for each competitor."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from gaugeblock.conformance.bench.competitors import Competitor
from gaugeblock.conformance.bench.counters import Counters, count
from gaugeblock.conformance.bench.problem import Direction, Limits, Problem, Results, Unavailable, make_problem, scaled
from gaugeblock.conformance.bench.roofline import Machine
from gaugeblock.conformance.bench.timing import Timing, measure
from gaugeblock.conformance.engine.contract import Contract, Workload

LONGEST_REASON = 100  # characters

# absent: it cannot or does not claim to take part here; failed: it raised; wrong: its results are
Status = Literal["measured", "absent", "failed", "wrong"]


@dataclass(frozen=True)
class Effort:
    """How much a bench may cost: the size of problems on the CPU, and seconds for each competitor."""

    limits: Limits
    seconds: float


@dataclass(frozen=True)
class Row:
    """One competitor on one workload; times in seconds, None where it did not take part."""

    contract: str
    workload: str
    scale: str
    """By which factors the workload was made smaller."""
    direction: str
    implementation: str
    status: Status = "measured"
    roofline: float | None = None
    """Median time over roofline time: 1 is the machine's limit."""
    median: float | None = None
    best: float | None = None
    flops_per_second: float | None = None
    bytes_per_second: float | None = None
    deviation: float | None = None
    """From the reference's results (`Problem.deviation`)."""
    peak_bytes: int | None = None
    """The most that one call held at a time, beside its inputs."""
    samples: tuple[int, int] = (0, 0)
    """Number of samples, and of those that other processes did not disturb."""
    reason: str = ""
    """Why it did not take part, or what is wrong with it."""


@dataclass(frozen=True)
class CounterRow:
    """One competitor's counters at the contract's first landmark, None where it did not take part."""

    contract: str
    direction: str
    implementation: str
    counters: Counters | None = None
    status: Status = "measured"
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Flat."""
        return {key: value for key, value in asdict(self).items() if key != "counters"} | (
            asdict(self.counters) if self.counters else {}
        )


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
            if each.interpreted and machine.device == "cpu":
                raise Unavailable("needs a GPU: the interpreter's time says nothing")
            call = each.prepare(problem)
            deviation = problem.deviation(call(), expected)
            peak = count(call, machine.device).peak_bytes if deviation <= tolerated else None
        except Exception as error:
            rows[each.name] = replace(row, status=_status(error), reason=_one_line(error))
            continue
        rows[each.name] = replace(row, deviation=deviation, peak_bytes=peak)
        if deviation <= tolerated:
            calls[each.name] = call
        else:
            reason = f"WRONG: deviates by more than {tolerated:.0e}"
            rows[each.name] = replace(rows[each.name], status="wrong", reason=reason)
    del expected
    for name, timing in measure(calls, machine.device, effort.seconds).items():
        rows[name] = _with_times(rows[name], timing, problem, machine)
    return sorted(rows.values(), key=lambda row: math.inf if row.roofline is None else row.roofline)


def count_calls(contract: Contract, direction: Direction, competing: Iterable[Competitor], machine: Machine) -> list[CounterRow]:
    """Counts what one call of each competitor needs at the contract's first landmark, small enough for an interpreter."""
    problem = make_problem(contract, contract.landmarks[0], direction, machine)
    rows = []
    for each in competing:
        row = CounterRow(contract.name, direction, each.name)
        try:
            call: Callable[[], Results] = each.prepare(problem)
            rows.append(replace(row, counters=count(call, machine.device)))
        except Exception as error:
            rows.append(replace(row, status=_status(error), reason=_one_line(error)))
    return rows


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


def _status(error: Exception) -> Status:
    return "absent" if isinstance(error, Unavailable | ImportError) else "failed"


def _one_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, Unavailable):
        return text
    if isinstance(error, ImportError):
        return f"not installed: {text}"
    return f"{type(error).__name__}: {text}"[:LONGEST_REASON]
