"""What the gate says: verdicts, the statistics behind them, and failures."""

import builtins
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gaugeblock.conformance.exit_status import CONFORM, FAILS, NOTHING_TESTED, WRONG_CALL

Status = Literal["pass", "warning", "fail", "not supported", "waived", "crash", "timeout", "error"]
STATUSES: tuple[Status, ...] = ("pass", "warning", "fail", "not supported", "waived", "crash", "timeout", "error")
FAILED: frozenset[Status] = frozenset({"fail", "crash", "timeout", "error"})


@dataclass(frozen=True)
class Statistics:
    """An output's errors in units of its error budget; 1 is the limit of each."""

    max: float
    """The worst element."""
    rms: float | None
    """Root mean square; None where there are too few elements to say."""
    bias: float | None
    """Mean of the signed error; None likewise."""
    elements: int
    """How many elements rms and bias are taken over."""

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.max, self.rms or 0.0, self.bias or 0.0)


@dataclass(frozen=True)
class Failure:
    """One broken promise, small enough to read."""

    message: str
    """What failed and by how much, in one line."""
    diagnosis: str = ""
    """The pattern of the bad elements, or an empty string."""
    details: tuple[str, ...] = ()
    """Further lines: the worst element, how each statistic stands."""
    cases: tuple[dict[str, Any], ...] = ()
    """The shrunk case, as keyword arguments of `Case`; several where only the pool of them fails."""
    script: str = ""
    """A stand-alone Python script that fails again."""
    output: str = ""
    """What the candidate printed, or its beginning."""


@dataclass(frozen=True)
class Coverage:
    """What the cases of a property have visited of what there is."""

    visited: int
    due: int
    """How many, and how many there are."""
    of: str
    """What is counted: "classes", "pairs", "triples", "classes, and pairs of options"."""
    sparing: bool = False
    """Fewer are visited on purpose: the implementation is built in, and the profile quick."""

    @property
    def lacking(self) -> bool:
        """Whether less was visited than should have been."""
        return self.visited < self.due and not self.sparing

    def __str__(self) -> str:
        return f"{self.visited} of {self.due} {self.of}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Contract × implementation × property × dtype × device, and what came of it; an "error" is the engine's own."""

    contract: str
    implementation: str
    kind: str
    property: str
    dtype: str
    device: str
    status: Status
    cases: int = 0
    seconds: float = 0.0
    reason: str = ""
    """One line: why not supported, the failure's message, the waiver's link, ..."""
    statistics: dict[str, Statistics] = field(default_factory=dict)
    """For each output and gradient, over all cases."""
    rounding: str = ""
    """The tightest rounding that was met ("strict", "eager"), or an empty string."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """For each case, a digest of the output bits, so that two runs can be compared."""
    failure: Failure | None = None
    coverage: Coverage | None = None
    """What was visited; None where nothing was, where it fails, and of a contract that names no factors."""
    kept: dict[str, str] | None = None
    """`date` and `commit` of an earlier run in which it was reached, if it was not reached again since nothing that it depends on
    has changed."""

    @builtins.property  # `property` is a field here
    def identity(self) -> str:
        """A stable name: `contract/implementation/property/dtype/device`."""
        return "/".join((self.contract, self.implementation, self.property, self.dtype, self.device))

    @builtins.property
    def worst(self) -> float | None:
        """The worst statistic over all outputs, in units of the budget; None where nothing was measured."""
        return max((each.worst for each in self.statistics.values()), default=None)

    def to_json(self) -> dict[str, Any]:
        """As plain data, to be written, not changed: `asdict` copies all of it, which takes a second of 20,000 verdicts."""
        parts = {name: part and vars(part) for name, part in (("failure", self.failure), ("coverage", self.coverage))}
        return vars(self) | parts | {"statistics": {name: vars(each) for name, each in self.statistics.items()}}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Verdict":
        """The inverse of `to_json`."""
        failure, coverage = data["failure"], data.get("coverage")
        return Verdict(
            **{
                **data,
                "statistics": {name: Statistics(**each) for name, each in data["statistics"].items()},
                "coverage": coverage and Coverage(**coverage),
                "failure": failure and Failure(**failure | {key: tuple(failure[key]) for key in ("details", "cases")}),
            }
        )


def exit_status(verdicts: Sequence[Verdict]) -> int:
    """0 all conform, 1 something fails, 2 the engine could not judge something, 3 nothing was tested."""
    if any(each.status == "error" for each in verdicts):
        return WRONG_CALL
    if any(each.status in FAILED for each in verdicts):
        return FAILS
    return CONFORM if any(each.cases for each in verdicts) else NOTHING_TESTED
