"""What the gate says: verdicts, the statistics behind them, and failures."""

import builtins
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["pass", "warning", "fail", "not supported", "waived", "crash", "timeout", "error"]
STATUSES: tuple[Status, ...] = ("pass", "warning", "fail", "not supported", "waived", "crash", "timeout", "error")
FAILED: frozenset[Status] = frozenset({"fail", "crash", "timeout", "error"})


@dataclass(frozen=True)
class Statistics:
    """An output's errors in units of its error budget; 1 is the limit of each.

    Attributes:
        max: The worst element.
        rms: Root mean square; None where there are too few elements to say.
        bias: Mean of the signed error; None likewise.
        elements: How many elements rms and bias are taken over.
    """

    max: float
    rms: float | None
    bias: float | None
    elements: int

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self.max, self.rms or 0.0, self.bias or 0.0)


@dataclass(frozen=True)
class Failure:
    """One broken promise, small enough to read.

    Attributes:
        message: What failed and by how much, in one line.
        diagnosis: The pattern of the bad elements, or an empty string.
        details: Further lines: the worst element, how each statistic stands.
        cases: The shrunk case, as keyword arguments of `Case`; several where only the pool of them fails.
        script: A stand-alone Python script that fails again.
        output: What the candidate printed, or its beginning.
    """

    message: str
    diagnosis: str = ""
    details: tuple[str, ...] = ()
    cases: tuple[dict[str, Any], ...] = ()
    script: str = ""
    output: str = ""


@dataclass(frozen=True)
class Coverage:
    """What the cases of a property have visited of what there is.

    Attributes:
        visited, due: How many, and how many there are.
        of: What is counted: "classes", "pairs", "triples", "classes, and pairs of options".
        sparing: Fewer are visited on purpose: the implementation is built in, and the profile quick.
    """

    visited: int
    due: int
    of: str
    sparing: bool = False

    @property
    def lacking(self) -> bool:
        """Whether less was visited than should have been."""
        return self.visited < self.due and not self.sparing

    def __str__(self) -> str:
        return f"{self.visited} of {self.due} {self.of}"


@dataclass(frozen=True)
class Verdict:
    """Contract × implementation × property × dtype × device, and what came of it; an "error" is the engine's own.

    Attributes:
        reason: One line: why not supported, the failure's message, the waiver's link, ...
        statistics: For each output and gradient, over all cases.
        profile: The tightest numerics profile that was met ("strict", "eager"), or an empty string.
        fingerprints: For each case, a digest of the output bits, so that two runs can be compared.
        coverage: What was visited; None where nothing was, where it fails, and of a contract that names no factors.
    """

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
    statistics: dict[str, Statistics] = field(default_factory=dict)
    profile: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict)
    failure: Failure | None = None
    coverage: Coverage | None = None

    @builtins.property  # `property` is a field here
    def identity(self) -> str:
        """A stable name: `contract/implementation/property/dtype/device`."""
        return "/".join((self.contract, self.implementation, self.property, self.dtype, self.device))

    @builtins.property
    def worst(self) -> float | None:
        """The worst statistic over all outputs, in units of the budget; None where nothing was measured."""
        return max((each.worst for each in self.statistics.values()), default=None)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

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
