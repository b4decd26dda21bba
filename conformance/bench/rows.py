"""What a bench finds out: a row of times for each workload and competitor, a row of counters for each competitor."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict

import torch

from gaugeblock.conformance.bench.competitors import Competitor, JaxCall
from gaugeblock.conformance.bench.counters import WARM_UP, Counters, count, count_on_ranks
from gaugeblock.conformance.bench.problem import Direction, Limits, Problem, Results, Unavailable, make_problem, scaled
from gaugeblock.conformance.bench.roofline import Machine
from gaugeblock.conformance.bench.timing import Timing, measure
from gaugeblock.conformance.engine.contract import Contract, Cost, Workload

LONGEST_REASON = 100  # characters
# A call is hopeless that takes so many times as long as the shortest, and a second at least; or a compiled program whose
# operations alone would take so many times the roofline time (of the rows that we know at most 1.7, or 32).
HOPELESS, HOPELESS_PROGRAM = 20, 10
NOT_HOPELESS = 1.0  # seconds
COMPILES = "compiles a whole model for a CPU, for which asv and counters do not wait"

Call = Callable[[], Results]

# absent: it cannot or does not claim to take part here; late: the time was up; failed: it raised; wrong: its results are
Status = Literal["measured", "absent", "late", "failed", "wrong"]


class WhyNot(TypedDict):
    """Fields of a row."""

    status: Status
    reason: str


class Late(Exception):
    """There was no time left."""

    def __str__(self) -> str:
        return "not measured: the time was up"


@dataclass(frozen=True)
class Effort:
    """How much a bench may cost."""

    limits: Limits
    """The size of problems on the CPU."""
    seconds: float
    """For each competitor."""
    until: float = math.inf
    """The end of all the time, as `time.monotonic` counts."""
    thrifty: bool = False
    """A program that is hopeless by its operations is not called at all, none is compiled to learn its memory, and no whole model
    for a CPU."""


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
    """Lets all competitors run one workload, checks their results, and times them in turn; the hopeless by one call, and last.

    Returns:
        A row for every competitor: those measured, fastest first, then the others.
    """
    parameters, scale = workload.parameters, "full size"
    named = {each.name: each for each in competing}
    if machine.device == "cpu":
        try:
            parameters, scale = scaled(contract, workload, effort.limits, machine.dtype)
        except Unavailable as reason:
            return [replace(Row(contract.name, workload.name, scale, direction, name), **why_not(reason)) for name in named]
    rows = {name: Row(contract.name, workload.name, scale, direction, name) for name in named}
    if time.monotonic() >= effort.until:
        return [replace(row, **why_not(Late())) for row in rows.values()]
    race = _Race(make_problem(contract, parameters, direction, machine), effort, rows)
    calls = race.prepare(named)
    hopeless = {name for name, call in calls.items() if race.least_ratio(call) > HOPELESS_PROGRAM}
    race.run({name: call for name, call in calls.items() if name not in hopeless})
    race.run({name: call for name, call in calls.items() if name in hopeless})
    return sorted(rows.values(), key=lambda row: math.inf if row.roofline is None else row.roofline)


class _Race:
    """One problem, and the rows that fill as its competitors run."""

    def __init__(self, problem: Problem, effort: Effort, rows: dict[str, Row]) -> None:
        self.problem, self.effort, self.rows = problem, effort, rows
        self.machine, self.expected = problem.machine, problem.expected()
        self.first = ("", math.inf)  # whose first call was the shortest, and seconds

    def prepare(self, competing: Mapping[str, Competitor]) -> dict[str, Call]:
        """The calls of those that can take part."""
        calls: dict[str, Call] = {}
        for name, each in competing.items():
            with self._fills(name):
                require_worth_while(each, self.machine, self.effort)
                self._need_time()
                call = each.prepare(self.problem)
                if self.effort.thrifty and (ratio := self.least_ratio(call)) > HOPELESS_PROGRAM:
                    raise Unavailable(f"hopeless: its program's operations take {ratio:.0f} times the roofline time")
                calls[name] = call
        return calls

    def run(self, calls: Mapping[str, Call]) -> None:
        """Calls each once, and times in turn those whose results are right and whom it is worth while."""
        right = {name: seconds for name, call in calls.items() if (seconds := self._first_call(name, call)) is not None}
        self.first = min([self.first, *right.items()], key=lambda each: each[1])
        timed = {name: calls[name] for name, seconds in right.items() if self._is_worth_while(name, calls[name], seconds)}
        timings = measure(timed, self.machine.device, self.effort.seconds, self.effort.until)
        for name, timing in timings.items():
            self._add_times(name, timing)
        for name in timed.keys() - timings.keys():
            self._add_one_time(name, right[name], "the time was up: its first call")

    def least_ratio(self, call: Call) -> float:
        """What a compiled program's operations take at the machine's ceiling, over the roofline time; 0 without a program."""
        if not isinstance(call, JaxCall) or call.program is None:
            return 0.0
        operations = Cost(flops=(call.program.cost_analysis() or {}).get("flops", 0.0), bytes=0.0)
        return self.machine.seconds(operations) / self.machine.seconds(self.problem.cost)

    def _first_call(self, name: str, call: Call) -> float | None:
        """Its seconds, if it is right."""
        with self._fills(name):
            self._need_time(self.least_ratio(call) * self.machine.seconds(self.problem.cost))
            seconds, results = self._timed(call)
            deviation, tolerated = self.problem.deviation(results, self.expected), _tolerated(self.machine)
            self.rows[name] = replace(self.rows[name], deviation=deviation)
            if deviation <= tolerated:
                return seconds
            self.rows[name] = replace(self.rows[name], status="wrong", reason=f"WRONG: deviates by more than {tolerated:.0e}")
        return None

    def _is_worth_while(self, name: str, call: Call, seconds: float) -> bool:
        """Whether to time further calls; the hopeless have their times by then, the others their memory."""
        with self._fills(name):
            fastest, shortest = self.first
            longest = max(HOPELESS * shortest, NOT_HOPELESS)
            if seconds > longest and not (isinstance(call, JaxCall) and call.program):
                seconds = self._timed(call)[0]  # the first one may have compiled what it called
            if seconds > longest:
                reason = f"hopeless: {seconds / shortest:.0f} times as long as {fastest}, so timed once"
                self._add_one_time(name, seconds, reason)
                return False
            to_compile = self.effort.thrifty and isinstance(call, JaxCall) and not call.program
            if time.monotonic() < self.effort.until and not to_compile:
                peak = count(call, self.machine.device, called=WARM_UP).peak_bytes
                self.rows[name] = replace(self.rows[name], peak_bytes=peak)
            return True
        return False

    def _add_one_time(self, name: str, seconds: float, reason: str) -> None:
        self.rows[name] = replace(self.rows[name], reason=reason)
        self._add_times(name, Timing(seconds, seconds, samples=1, quiet=0))

    def _add_times(self, name: str, timing: Timing) -> None:
        cost = self.problem.cost
        self.rows[name] = replace(
            self.rows[name],
            roofline=timing.median / self.machine.seconds(cost),
            median=timing.median,
            best=timing.best,
            flops_per_second=cost.flops / timing.median,
            bytes_per_second=cost.bytes / timing.median,
            samples=(timing.samples, timing.quiet),
        )

    def _timed(self, call: Call) -> tuple[float, Results]:
        start = time.perf_counter()
        results = call()
        if self.machine.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, results

    def _need_time(self, seconds: float = 0.0) -> None:
        if time.monotonic() + seconds >= self.effort.until:
            raise Late

    @contextmanager
    def _fills(self, name: str) -> Iterator[None]:
        """Has a row say why its competitor is not measured."""
        try:
            yield
        except Exception as error:
            self.rows[name] = replace(self.rows[name], **why_not(error))


def count_calls(
    contract: Contract, direction: Direction, competing: Iterable[Competitor], machine: Machine, until: float = math.inf
) -> list[CounterRow]:
    """Counts what one call of each competitor needs at the contract's first landmark, small enough for an interpreter."""
    problem = make_problem(contract, contract.landmarks[0], direction, machine)
    rows = []
    for each in competing:
        row = CounterRow(contract.name, direction, each.name)
        try:
            if time.monotonic() >= until:
                raise Late
            if each.compiles and machine.device == "cpu":
                raise Unavailable(COMPILES)
            if each.on_ranks:
                counters = count_on_ranks(each.on_ranks, contract, direction, machine)
            else:
                counters = count(each.prepare(problem), machine.device)
            rows.append(replace(row, counters=counters))
        except Exception as error:
            rows.append(replace(row, **why_not(error)))
    return rows


def _tolerated(machine: Machine) -> float:
    """Half of the digits must be right: what is timed is the operation; its precision is the gate's business."""
    return math.sqrt(torch.finfo(getattr(torch, machine.dtype)).eps)


def require_worth_while(competitor: Competitor, machine: Machine, effort: Effort) -> None:
    """Raise Unavailable where a CPU would take long to say little."""
    if machine.device == "cpu" and competitor.interpreted:
        raise Unavailable("needs a GPU: the interpreter's time says nothing")
    if machine.device == "cpu" and competitor.compiles and effort.thrifty:
        raise Unavailable(COMPILES)


def why_not(error: Exception) -> WhyNot:
    """What the row says of a competitor that was not measured."""
    return {"status": _status(error), "reason": _one_line(error)}


def _status(error: Exception) -> Status:
    if isinstance(error, Late):
        return "late"
    return "absent" if isinstance(error, Unavailable | ImportError) else "failed"


def _one_line(error: Exception) -> str:
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, Unavailable | Late):
        return text
    if isinstance(error, ImportError):
        return f"not installed: {text}"
    return f"{type(error).__name__}: {text}"[:LONGEST_REASON]
