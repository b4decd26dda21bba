"""A mutant put through the properties, as a user's candidate is, until one fails.

It is judged in its hardest dtype, the narrowest that the implementation takes: there budgets are widest, and a cast or an
accumulator is more than a name. What survives there is judged in float32 too, and the table says so.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.exploration import PROFILES, check, explore, pooled_violation
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.inputs.coverage import landmarks
from gaugeblock.conformance.engine.judging.violation import Violation
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import contracts, find_contract
from gaugeblock.conformance.engine.trial import Ledger, Property, Subject
from gaugeblock.conformance.selftest.mutants.copies import between, path_of, reached
from gaugeblock.conformance.selftest.mutants.sources import Mutant
from gaugeblock.conformance.selftest.mutants.tracing import entry_of, module_of, rows_of

PROFILE = replace(PROFILES["quick"], shrink_seconds=0.0)
DTYPES = ("bfloat16", "float16", "float32")  # the hardest first
LIKELY = ("parity", "gradients", "rejections", "layout", "gradient_layout", "empty_and_one", "fully_written", "out_of_bounds")


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant."""

    mutant: Mutant
    contract: str
    implementation: str
    """Under which it was judged."""
    dtype: str = ""
    """In which it failed, or was judged last."""
    is_easier: bool = False
    """Whether that is not its hardest dtype."""
    killed_by: str = ""
    """The property that failed; empty if it survived."""
    reason: str = ""
    """Of the failure."""
    unsound: str = ""
    """Why nothing is known of it, or not all: the right implementation fails too, or the engine did."""
    seconds: float = 0.0


def judge(contract: str, implementation: str, mutant: Mutant, names: Sequence[str] = ()) -> Outcome:
    """Judges one mutant of a module that an implementation of ours runs through.

    Args:
        names: Of the properties; by default all, those first that most likely see it.
    """
    start, row = time.monotonic(), row_of(contract, implementation)
    outcome = Outcome(mutant, contract, implementation)
    for number, dtype in enumerate(hardest_first(row)):
        outcome = replace(outcome, dtype=dtype, is_easier=number > 0)
        for prop in (properties()[name] for name in names or order_for(mutant)):
            violation, cases = _failure(_mutated(row, mutant, dtype), prop)
            if violation is None:
                continue
            if _holds(Subject(_right(row), dtype, "cpu"), prop, tuple(cases)):
                return replace(outcome, killed_by=prop.name, reason=violation.message, seconds=time.monotonic() - start)
            outcome = replace(outcome, unsound=f"the right one fails {prop.name} too: {violation.message}")
    return replace(outcome, seconds=time.monotonic() - start)


def judge_elsewhere(outcome: Outcome) -> Outcome:
    """The same mutant under all else that imports its module, the cheapest first, up to the first that sees it.

    Only parity and gradients look at it there; if it is about bad calls, one round of those in its hardest dtype and in float32,
    where two dtypes may be the same. Whether its line is run is not looked up: where it is not, it survives again.
    """
    start, mutant = time.monotonic(), outcome.mutant
    for contract in sorted(contracts().values(), key=lambda each: -each.cases):
        others = [each for each in rows_of(contract) if mutant.module in reached(module_of(each))]
        for row in apart(others):
            if (contract.name, row.name) != (outcome.contract, outcome.implementation):
                names = contract.name, row.name
                found = _rejected(contract, row, mutant) if is_validation(mutant) else judge(*names, mutant, LIKELY[:2])
                if found.killed_by:
                    return replace(found, seconds=outcome.seconds + time.monotonic() - start)
    return replace(outcome, seconds=outcome.seconds + time.monotonic() - start)


def apart(rows: Sequence[Implementation]) -> list[Implementation]:
    """The first of each framework, and every kernel: of those in one module each takes another way through it."""
    return [*{(each.framework, each.name * (each.kind == "triton")): each for each in reversed(rows)}.values()]


def _rejected(contract: Contract, row: Implementation, mutant: Mutant) -> Outcome:
    """What the bad calls of one case say of a mutant."""
    outcome, prop, case = Outcome(mutant, contract.name, row.name), properties()["rejections"], landmarks(contract)[0]
    for number, dtype in enumerate(hardest_first(row)):
        outcome = replace(outcome, dtype=dtype, is_easier=number > 0)
        violation = check(_mutated(row, mutant, dtype), prop, case, Ledger())
        if violation is not None and _holds(Subject(_right(row), dtype, "cpu"), prop, (case,)):
            return replace(outcome, killed_by=prop.name, reason=violation.message)
    return outcome


def is_validation(mutant: Mutant) -> bool:
    """Whether it is about bad calls."""
    return ".validation" in mutant.module or mutant.text.startswith("validation.")


def hardest_first(row: Implementation) -> list[str]:
    """The hardest dtype that an implementation takes, then float32."""
    taken = [each for each in DTYPES if each in row.dtypes]
    return list(dict.fromkeys([taken[0], taken[-1]]))


def order_for(mutant: Mutant) -> list[str]:
    """All properties, those first that most likely see a change in this place."""
    first = "rejections" if is_validation(mutant) else "gradients" if "backward" in mutant.function else "parity"
    return list(dict.fromkeys([first, *LIKELY, *properties()]))


@cache
def row_of(contract: str, implementation: str) -> Implementation:
    """The implementation of that name as its mutants are judged: without jit, which compiles each of them anew."""
    return replace(next(each for each in rows_of(find_contract(contract)) if each.name == implementation), jit=False)


def _mutated(row: Implementation, mutant: Mutant, dtype: str) -> Subject:
    """An implementation with a mutant's module for its own, on trial."""
    if not between(module_of(row), mutant.module):
        raise ImportError(f"{entry_of(row)} does not import {mutant.module}")
    named = replace(row, name=f"mutant {mutant.number} of {mutant.module}", function=path_of(mutant, entry_of(row)))
    return Subject(named, dtype, "cpu")


def _right(row: Implementation) -> Implementation:
    """The same implementation as it is, called as a mutant is."""
    return replace(row, name=f"right {row.name}", function=entry_of(row))


def _failure(subject: Subject, prop: Property) -> tuple[Violation | None, list[Case]]:
    ledger = Ledger()
    if prop.inapplicable(subject):
        return None, []
    violation, cases = explore(subject, prop, PROFILE, ledger)
    if violation is None:
        return pooled_violation(ledger), ledger.cases
    return violation, cases


@cache
def _holds(subject: Subject, prop: Property, cases: tuple[Case, ...]) -> bool:
    ledger = Ledger()
    return all(check(subject, prop, case, ledger) is None for case in cases) and pooled_violation(ledger) is None
