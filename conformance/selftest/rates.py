"""The four rates by which the suite is measured, each by a function that a test can call with few cases.

Beside them stands what a plain test reaches on the same cases: outputs and gradients compared with the reference in the same
dtype, ids for equality, at usual tolerances.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as start_from

from gaugeblock.conformance.engine.budget.oracle import GRADIENT, budgets
from gaugeblock.conformance.engine.exploration import Profile, check, examine, pooled_violation
from gaugeblock.conformance.engine.inputs.cases import Case, cases
from gaugeblock.conformance.engine.judging.judge import Violation, judge
from gaugeblock.conformance.engine.judging.verdict import FAILED
from gaugeblock.conformance.engine.processes.handle import Lost
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import find_contract, implementations
from gaugeblock.conformance.engine.trial import Ledger, Property, Subject, Trial
from gaugeblock.conformance.engine.vocabulary import Tensors
from gaugeblock.conformance.selftest.fault import Fault, contract_of, process_kept, right_kernels
from gaugeblock.conformance.selftest.variant import variants

RIGHT = {contract_of(each): each for each in right_kernels() if "world_sizes" not in getattr(each, "claims", {})}
CAUGHT = FAILED - {"error"}  # an error of the engine catches nothing
SOURCE = "gaugeblock.conformance.selftest.candidates"
Close = Callable[[torch.Tensor, torch.Tensor], bool]


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    try:
        torch.testing.assert_close(actual, expected, equal_nan=True)
    except AssertionError:
        return False
    return True


def _allclose(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(
        actual.double(), expected.double(), atol=1e-2, rtol=1e-2, equal_nan=True
    )


PLAIN_TESTS: dict[str, Close] = {"assert_close": _assert_close, "allclose 1e-2": _allclose}


def plainly_rejected(subject: Subject, case: Case, gradients: bool, close: Close) -> bool:
    """Whether a plain test rejects a candidate on one case; one that raises is rejected too."""
    reference = implementations(subject.implementation.contract)[0]
    expected = Trial(Subject(reference, subject.dtype, "cpu"), case).run(gradients=gradients)
    try:
        results = Trial(subject, case).run(gradients=gradients)
    except Exception:
        return True
    return not all(close(results[key], tensor) for key, tensor in expected.items())


def _gradients_due(prop: Property, subject: Subject, case: Case) -> bool:
    differentiable = subject.contract.regime(case.regime).differentiable and subject.implementation.differentiable
    return differentiable and "differentiable" in prop.needs


@dataclass(frozen=True)
class Kill:
    """What came of a planted bug."""

    contract: str
    name: str
    kind: str
    property: str
    killed: bool
    """Whether the property that it names failed."""
    cases: int
    """Examples until then."""
    reason: str
    size: int | None
    smallest: int | None
    """Product of the shrunk case's sizes, and of the smallest failing one where that is known."""
    script: str
    """Of the reproduction."""
    plain: tuple[str, ...]
    """Which plain tests reject the same bug, but not the right kernel, on one of the landmarks that the gate visits, or on the
    case it stopped at."""


def kill(fault: Fault, profile: Profile) -> Kill:
    """Puts a planted bug through the property that should catch it."""
    prop = properties()[fault.caught_by]
    with process_kept():
        verdict = examine(fault.subject(), prop, profile, SOURCE)
    failing = [Case(**case) for case in verdict.failure.cases] if verdict.failure else []
    contract = find_contract(fault.contract)
    examples = max(1, round(prop.weight * contract.cases * profile.examples))
    landmarks = [case for regime in prop.regimes_of(contract) for case in landmark_cases(fault.contract, regime)[:examples]]
    with process_kept():
        subject = fault.subject()
        right = contract.twin if subject.implementation.framework == "jax" else RIGHT[fault.contract]()
        twin = replace(subject, implementation=replace(subject.implementation, function=right))
        plain = [
            name
            for name, close in PLAIN_TESTS.items()
            if not subject.on_ranks  # a plain test has one process
            and any(
                plainly_rejected(subject, case, due, close) and not plainly_rejected(twin, case, due, close)
                for case in [*landmarks, *failing]
                for due in [_gradients_due(prop, subject, case)]
            )
        ]
    return Kill(
        fault.contract, fault.name, fault.kind, fault.caught_by, verdict.status in CAUGHT, verdict.cases, verdict.reason,
        size_product(failing[0]) if len(failing) == 1 else None, fault.smallest,
        verdict.failure.script if verdict.failure else "", tuple(plain),
    )  # fmt: skip


def size_product(case: Case) -> int:
    """Product of a case's sizes."""
    numbers = [value for value in case.parameters.values() if isinstance(value, int) and not isinstance(value, bool)]
    return math.prod(max(1, number) for number in numbers)


@dataclass
class Alarms:
    """Judgements of right variants."""

    judged: int = 0
    """How many times a variant was judged on a case."""
    alarms: list[str] = field(default_factory=list)
    """What was rejected, and why."""
    plain: dict[str, int] = field(default_factory=dict)
    """How many of the same results each plain test rejects."""

    def __add__(self, other: "Alarms") -> "Alarms":
        plain = {name: self.plain.get(name, 0) + other.plain.get(name, 0) for name in self.plain | other.plain}
        return Alarms(self.judged + other.judged, self.alarms + other.alarms, plain)


def drawn_cases(contract: str, regime: str, examples: int, seed: int) -> list[Case]:
    """Cases as the gate draws them."""
    drawn: list[Case] = []
    search = settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=(Phase.generate,)
    )(
        given(cases(find_contract(contract), regime))(lambda case: drawn.append(case))
    )  # a builtin has no code for Hypothesis to look at
    start_from(seed)(search)()
    return drawn


def landmark_cases(contract: str, regime: str) -> list[Case]:
    """A contract's landmarks with values of a regime."""
    return [Case(**sizes, regime=regime, seed=seed) for seed, sizes in enumerate(find_contract(contract).landmarks)]


def judge_variants(contract: str, dtype: str, drawn: Sequence[Case]) -> Alarms:
    """Judges every right variant of a contract on given cases, alone and all cases together."""
    found = Alarms(plain=dict.fromkeys(PLAIN_TESTS, 0))
    rows = [
        (each, subject)
        for each in variants()
        if each.contract == contract
        for subject in each.subjects()
        if subject.dtype == dtype
    ]
    ledgers = {variant.name: Ledger() for variant, _ in rows}
    for case in drawn:
        for variant, subject in rows:
            if variant.fits(case):
                gradients = subject.contract.regime(case.regime).differentiable and subject.implementation.differentiable
                prop = properties()["gradients" if gradients else "parity"]
                violation = check(subject, prop, case, ledgers[variant.name])
                ledgers[variant.name].cases.append(case)
                found.judged += 1
                if violation is not None:
                    found.alarms.append(f"{variant.name} in {dtype}: {violation.message}; {case!r}")
                for name, close in PLAIN_TESTS.items():
                    found.plain[name] += not subject.on_ranks and plainly_rejected(subject, case, gradients, close)
    pooled = {name: pooled_violation(ledger) for name, ledger in ledgers.items()}
    found.alarms += [f"{name} in {dtype}: {violation.message}" for name, violation in pooled.items() if violation is not None]
    return found


@dataclass
class Vacuity:
    """Judgements of trivial candidates."""

    judged: int = 0
    """How many."""
    passed: list[str] = field(default_factory=list)
    """Those that no judgement rejected."""
    coincidences: int = 0
    """Those that are the right result: a weight that is 1 for every token, zeros that underflow."""

    def __add__(self, other: "Vacuity") -> "Vacuity":
        return Vacuity(self.judged + other.judged, self.passed + other.passed, self.coincidences + other.coincidences)


def judge_trivial(contract_name: str, dtype: str, drawn: Sequence[Case]) -> Vacuity:
    """Judges results that no computation was needed for; ids, where there are any, are right unless rows are exchanged."""
    found, contract = Vacuity(), find_contract(contract_name)
    for case in drawn:
        right, stale = (
            _right_results(contract_name, dtype, case),
            _right_results(contract_name, dtype, case.replace(seed=case.seed + 1)),
        )
        inputs = Trial(Subject(implementations(contract_name)[0], dtype, "cpu"), case).inputs()
        for part in ("outputs", "gradients"):
            keys = [key for key in right if key.startswith(GRADIENT) == (part == "gradients")]
            if not any(right[key].numel() for key in keys):
                continue
            for name, results in _trivial({key: right[key] for key in keys}, stale, inputs).items():
                found.judged += 1
                try:
                    judge(contract, case, dtype, "strict", right | results)
                except Violation:
                    continue
                exact = not any(right[key].is_floating_point() for key in keys)
                if all(torch.equal(results[key], right[key]) if exact else _equal(results[key], right[key]) for key in keys):
                    found.coincidences += 1
                else:
                    found.passed.append(f"{name} {part} in {dtype}: {case!r}")
    return found


def _right_results(contract_name: str, dtype: str, case: Case) -> Tensors:
    """The oracle's results, rounded, at the reference's choice of ids."""
    contract, reference = find_contract(contract_name), implementations(contract_name)[0]
    gradients = contract.regime(case.regime).differentiable
    results = Trial(Subject(reference, dtype, "cpu"), case).run(gradients=gradients)
    chosen = next((results[spec.name] for spec in contract.outputs if spec.indexes), None)
    judged = budgets(contract, case, dtype, "strict", gradients=gradients, chosen=chosen)
    return results | {key: budget.value.to(results[key].dtype) for key, budget in judged.items()}


def _trivial(right: Tensors, stale: Tensors, inputs: Tensors) -> dict[str, Tensors]:
    floats = any(
        each.is_floating_point() for each in right.values()
    )  # where there are none, whole numbers are all that is judged
    numbers = [each.flatten().double() for each in inputs.values() if each.is_floating_point()]
    echo = torch.cat(numbers or [each.flatten() for each in inputs.values()])
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "zero": torch.zeros_like,
        "half": lambda each: (each.double() / 2).to(each.dtype),  # no arithmetic has eight bits
        "negated": lambda each: (-each.double()).to(each.dtype),
        "NaN": lambda each: torch.full_like(each, math.nan),
        "echoed": lambda each: echo.repeat(-(-each.numel() // echo.numel()))[: each.numel()].view_as(each).to(each.dtype),
    }
    trivial = {
        name: {key: change(each) if each.is_floating_point() or not floats else each for key, each in right.items()}
        for name, change in changes.items()
        if floats or name != "NaN"
    }
    return trivial | {
        "stale": {key: stale[key] for key in right},
        "shuffled": {key: each.roll(1, 0) if each.ndim else each for key, each in right.items()},
    }


def _equal(result: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal to the last bit or two; a gradient that cancels but for its rounding (one renormalized weight) is zero."""
    if not right.is_floating_point():
        return True  # ids that the judge accepts are right
    return torch.allclose(result.double(), right.double(), rtol=2 * torch.finfo(right.dtype).eps, atol=2.0**-50, equal_nan=True)


def fails_again(script: str, folder: str) -> bool:
    """Whether a printed script, run alone in a fresh process, fails with the violation that it was printed for."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    violations = (f"{each.__module__}.{each.__qualname__}" for each in (Violation, Lost))
    return ended.returncode == 1 and any(each in ended.stderr for each in violations)
