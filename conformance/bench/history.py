"""The questions whose answers asv keeps: cost at published sizes, counters, accuracy, determinism; asked of every contract of a
family. And of language models, how they decode.

asv takes a larger number for a worse one, so throughput is kept as time over roofline time. A file of `benchmarks/` asks the
questions about one family; `gaugeblock bench --asv` asks them on a machine that has no asv. Both read what is asked from the
contracts. A result is a number, NaN where an implementation does not take part, or the reason why it failed.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, ClassVar

from gaugeblock.conformance.bench.problem import FULL, directions, fits
from gaugeblock.conformance.engine.contract import Contract, Workload
from gaugeblock.conformance.engine.registry import contracts

if TYPE_CHECKING:
    from gaugeblock.conformance.engine.registry import Implementation

CPU = "two-cores/"  # how the names of workloads begin that are made for a CPU
DECODED = "sdar.sdar_cached"  # the contract whose implementations decode
SECONDS = 0.2  # for each competitor on each workload

Point = tuple[str, ...]  # a value of each parameter
Answers = dict[Point, dict[str, float] | str]  # a number for each metric, or why there is none


def families() -> dict[str, list[Contract]]:
    """The contracts by family: `experts` to those named `experts.…`."""
    return {family: list(group) for family, group in itertools.groupby(contracts().values(), lambda row: row.family)}


def for_cpu(contract: Contract, dtype: str) -> list[Workload]:
    """The workloads that a CPU runs in full size: those made for it, or else the smallest and the largest that fit."""
    fitting = [workload for workload in contract.workloads if fits(contract, workload, FULL, dtype)]
    by_size = sorted(fitting, key=lambda each: contract.cost(each.parameters, 1).bytes)
    return [workload for workload in fitting if workload.name.startswith(CPU)] or by_size[:1] + by_size[1:][-1:]


class Question(ABC):
    """What asv asks about a family; a subclass of a question is a benchmark class of `benchmarks/`.

    Attributes:
        version: Changed by hand when numbers are no longer comparable; asv hides those of another version.
        param_names, params: The points at which it is asked, as asv wants them.
        metrics: Names of the `track_` methods, each with its unit.
    """

    version = "1"
    metrics: ClassVar[dict[str, str]] = {}
    param_names: ClassVar[list[str]] = []
    params: ClassVar[list[list[str]]] = []
    family: ClassVar[str] = ""

    def __init_subclass__(cls, family: str = "") -> None:
        if family:
            cls.family, cls.params = family, cls.points(families()[family])
            # asv keeps what a set-up returned by the module and line in which it stands: each family needs its own
            own = FunctionType(cls.setup_cache.__code__, globals(), "setup_cache")
            own.__module__ = cls.__module__
            cls.setup_cache = own  # type: ignore[method-assign]

    @classmethod
    def is_about(cls, asked: list[Contract]) -> bool:
        """Whether there is anything to ask about these."""
        return True

    @classmethod
    @abstractmethod
    def points(cls, asked: list[Contract]) -> list[list[str]]:
        """The values of each parameter."""

    @abstractmethod
    def setup_cache(self) -> Answers:
        """Measures everything; points that are not among the answers do not exist."""


def number(answers: Answers, point: Point, metric: str) -> float:
    """One answer.

    Raises:
        RuntimeError: With the reason, if the implementation failed there.
    """
    answer = answers.get(point, {})
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer.get(metric, math.nan)


def _tracker(metric: str, unit: str) -> Callable[..., float]:
    def track(self: Question, answers: Answers, *point: str) -> float:
        return number(answers, point, metric)

    track.__doc__ = f"{metric.replace('_', ' ')}, {unit}"
    track.unit = unit  # type: ignore[attr-defined]  # where asv looks for it
    return track


class Cost(Question):
    """How far each implementation is from what the machine allows, and the memory it takes; on a CPU where the size fits."""

    param_names: ClassVar[list[str]] = ["workload", "direction", "implementation"]
    metrics: ClassVar[dict[str, str]] = {"time_over_roofline": "times", "peak_memory": "bytes"}
    track_time_over_roofline = _tracker("time_over_roofline", "times")
    track_peak_memory = _tracker("peak_memory", "bytes")

    @classmethod
    def points(cls, asked: list[Contract]) -> list[list[str]]:
        """All workloads in both directions, all competitors."""
        workloads = [f"{_operation(contract)} {workload.name}" for contract in asked for workload in contract.workloads]
        return [workloads, _all_directions(asked), _all_competitors(asked)]

    def setup_cache(self) -> Answers:
        """Competitors in turn, workload by workload."""
        from gaugeblock.conformance.bench.competitors import competitors
        from gaugeblock.conformance.bench.roofline import this_machine
        from gaugeblock.conformance.bench.rows import Effort, bench
        from gaugeblock.conformance.bench.timing import keep_freed_memory

        keep_freed_memory()
        effort = Effort(FULL, SECONDS, thrifty=True)
        found: Answers = {}
        for contract in families()[self.family]:
            machine, competing = this_machine(contract.dtypes), competitors(contract)
            for workload in contract.workloads if machine.device == "cuda" else for_cpu(contract, machine.dtype):
                for direction in directions(contract):
                    for row in bench(contract, workload, direction, competing, machine, effort):
                        point = (f"{_operation(contract)} {workload.name}", direction, row.implementation)
                        if row.status in ("failed", "wrong"):
                            found[point] = row.reason
                        elif row.roofline is not None:
                            peak = math.nan if row.peak_bytes is None else float(row.peak_bytes)
                            found[point] = {"time_over_roofline": row.roofline, "peak_memory": peak}
        return found


class Counters(Question):
    """What one call allocates, dispatches and launches, at the contract's first landmark."""

    param_names: ClassVar[list[str]] = ["operation", "direction", "implementation"]
    metrics: ClassVar[dict[str, str]] = {"bytes_allocated": "bytes", "operations": "operations", "kernels": "kernels"}
    track_bytes_allocated = _tracker("bytes_allocated", "bytes")
    track_operations = _tracker("operations", "operations")
    track_kernels = _tracker("kernels", "kernels")

    @classmethod
    def points(cls, asked: list[Contract]) -> list[list[str]]:
        """All operations in both directions, all competitors."""
        return [[_operation(contract) for contract in asked], _all_directions(asked), _all_competitors(asked)]

    def setup_cache(self) -> Answers:
        """Triton's kernels are interpreted where there is no GPU: their time says nothing, their number does."""
        from gaugeblock.conformance.engine.devices import interpret_without_gpu

        interpret_without_gpu()
        from gaugeblock.conformance.bench.competitors import competitors
        from gaugeblock.conformance.bench.roofline import this_machine
        from gaugeblock.conformance.bench.rows import count_calls

        found: Answers = {}
        for contract in families()[self.family]:
            for direction in directions(contract):
                for row in count_calls(contract, direction, competitors(contract), this_machine(contract.dtypes, quick=True)):
                    point = (_operation(contract), direction, row.implementation)
                    if row.status == "failed":
                        found[point] = row.reason
                    elif row.counters is not None:
                        counted = {name: getattr(row.counters, name) for name in self.metrics}
                        found[point] = {name: float(value) for name, value in counted.items() if value is not None}
        return found


class AtLandmark(Question):
    """Something asked of every dtype of every implementation, at the contract's first landmark."""

    param_names: ClassVar[list[str]] = ["operation", "dtype", "implementation"]

    @classmethod
    def points(cls, asked: list[Contract]) -> list[list[str]]:
        """All operations, dtypes and implementations."""
        from gaugeblock.conformance.engine.registry import implementations

        dtypes: list[str] = [dtype for contract in asked for dtype in contract.dtypes]
        names = [each.name for contract in asked for each in implementations(contract.name)]
        return [[_operation(contract) for contract in asked], _unique(dtypes), _unique(names)]

    def ask(self, question: Callable[[Contract, "Implementation", str], dict[str, float]]) -> Answers:
        """The answers; Triton's kernels are interpreted where there is no GPU."""
        from gaugeblock.conformance.engine.devices import interpret_without_gpu

        interpret_without_gpu()
        from gaugeblock.conformance.bench.landmark import answers

        return {
            (_operation(contract), dtype, name): answer
            for contract in families()[self.family]
            for (dtype, name), answer in answers(contract, question)
        }


class Accuracy(AtLandmark):
    """The rms and bias of the errors of the worst output or gradient, in units of their limits (1 is the limit)."""

    metrics: ClassVar[dict[str, str]] = {"rms": "limits", "bias": "limits"}
    track_rms = _tracker("rms", "limits")
    track_bias = _tracker("bias", "limits")

    def setup_cache(self) -> Answers:
        """Both, pooled over a few cases."""
        from gaugeblock.conformance.bench.accuracy import accuracy

        return self.ask(accuracy)


class Determinism(AtLandmark):
    """Distinct bit patterns over several runs of one input: 1 is right."""

    metrics: ClassVar[dict[str, str]] = {"bit_patterns": "patterns"}
    track_bit_patterns = _tracker("bit_patterns", "patterns")

    def setup_cache(self) -> Answers:
        """Their number."""
        from gaugeblock.conformance.bench.determinism import bit_patterns

        return self.ask(bit_patterns)


class Decoding(Question):
    """How fast each implementation decodes a block after a prompt, and in how many passes; by each strategy."""

    param_names: ClassVar[list[str]] = ["workload", "strategy", "implementation"]
    metrics: ClassVar[dict[str, str]] = {"block": "seconds", "passes_per_block": "passes", "passes_per_token": "passes"}
    track_block = _tracker("block", "seconds")
    track_passes_per_block = _tracker("passes_per_block", "passes")
    track_passes_per_token = _tracker("passes_per_token", "passes")

    @classmethod
    def is_about(cls, asked: list[Contract]) -> bool:
        """Of what is told a past, one is decoded."""
        return any(contract.name == DECODED for contract in asked)

    @classmethod
    def points(cls, asked: list[Contract]) -> list[list[str]]:
        """All workloads, strategies and competitors."""
        from gaugeblock.conformance.bench.decoding import STRATEGIES

        decoded = [contract for contract in asked if contract.name == DECODED]
        workloads = [workload.name for contract in decoded for workload in contract.workloads]
        return [workloads, list(STRATEGIES), _all_competitors(decoded)]

    def setup_cache(self) -> Answers:
        """Competitors in turn, workload by workload."""
        from gaugeblock.conformance.bench.competitors import competitors
        from gaugeblock.conformance.bench.decoding import decode
        from gaugeblock.conformance.bench.roofline import this_machine
        from gaugeblock.conformance.bench.rows import Effort

        found: Answers = {}
        contract = contracts()[DECODED]
        machine, effort = this_machine(contract.dtypes, quick=True), Effort(FULL, SECONDS, thrifty=True)
        for workload in contract.workloads if machine.device == "cuda" else for_cpu(contract, machine.dtype):
            for row in decode(contract, workload, competitors(contract), machine, effort):
                point = (workload.name, row.strategy, row.implementation)
                if row.status in ("failed", "wrong"):
                    found[point] = row.reason
                elif row.tokens_per_pass is not None and row.passes_per_block is not None:
                    block = math.nan if row.block is None else row.block
                    passes = {"passes_per_block": row.passes_per_block, "passes_per_token": 1 / row.tokens_per_pass}
                    found[point] = {"block": block, **passes}
        return found


QUESTIONS: tuple[type[Question], ...] = (Cost, Counters, Accuracy, Determinism, Decoding)


def benchmarks() -> Iterator[tuple[str, type[Question]]]:
    """Every question about every family, with the name that asv gives its class."""
    for family, asked in families().items():
        for question in (each for each in QUESTIONS if each.is_about(asked)):
            yield f"{family}.{question.__name__}", type(question.__name__, (question,), {}, family=family)


def _operation(contract: Contract) -> str:
    return contract.name.partition(".")[2]


def _all_directions(asked: list[Contract]) -> list[str]:
    return _unique([direction for contract in asked for direction in directions(contract)])


def _all_competitors(asked: list[Contract]) -> list[str]:
    from gaugeblock.conformance.bench.competitors import competitors

    return _unique([each.name for contract in asked for each in competitors(contract)])


def _unique(names: list[str]) -> list[str]:
    return list(dict.fromkeys(names))
