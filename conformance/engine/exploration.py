"""A subject put through a property: which cases are tried, what of a failure is shown, and the verdict."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from gaugeblock.conformance.engine.failure_script import script_for
from gaugeblock.conformance.engine.inputs.cases import Case, Layout, cases
from gaugeblock.conformance.engine.inputs.coverage import Demand, few_visits, laid_out, layouts_of, measure, visits
from gaugeblock.conformance.engine.judging.judge import Violation, describe_statistics, name_worst
from gaugeblock.conformance.engine.judging.verdict import Failure, Status, Verdict
from gaugeblock.conformance.engine.processes.handle import Lost
from gaugeblock.conformance.engine.processes.seats import Seat
from gaugeblock.conformance.engine.registry import is_built_in
from gaugeblock.conformance.engine.shardings import fit
from gaugeblock.conformance.engine.trial import Ledger, OutOfTime, Property, Subject, Trial, violation_of

WARNING = 0.9  # of a limit: a right implementation has an rms of about 1 deviation, which is 0.83 of its limit
SLOW_SECONDS = 10.0  # for a case that was begun while there was time to shrink
LEFT_TO_PARTS = "of ours judged of the kernels it is made of; of it with --profile ci"
SHRINK_EXAMPLES = 400  # cases drawn in search of a smaller failure, if time allows


@dataclass(frozen=True)
class Profile:
    """How long the gate may take."""

    name: str
    examples: int
    """Drawn cases of the main regime, after those that cover, per unit of a property's weight; half as many of each other regime.
    """
    compiled_examples: int
    """The same for JAX, which compiles for every new shape and so draws other values for the same shapes."""
    shrink_seconds: float
    """How long a failure may be shrunk; with 0 the first is taken."""
    verdict_seconds: float
    """How long one property of one subject may take before its process is killed."""
    more: int = 0
    """Of how many factors more than the property asks for every combination of classes is visited."""
    sparing: bool = False
    """Whether of what is built in only so many landmarks, and as many cases that cover, are visited as are drawn else."""
    derandomize: bool = True
    """The same cases every time; else new ones."""


PROFILES = {
    each.name: each
    for each in (
        Profile("quick", examples=4, compiled_examples=2, shrink_seconds=4, verdict_seconds=120, sparing=True),
        Profile("ci", examples=20, compiled_examples=6, shrink_seconds=15, verdict_seconds=600, more=1),
        Profile(
            "thorough", examples=300, compiled_examples=60, shrink_seconds=120, verdict_seconds=7200, more=1, derandomize=False
        ),
    )
}


def verdict_on(subject: Subject, name: str, status: Status, reason: str = "", seconds: float = 0.0) -> Verdict:
    """The verdict of the property of that name on what was not judged, or not yet."""
    whose = subject.implementation
    return Verdict(
        contract=whose.contract,
        implementation=whose.name,
        kind=whose.kind,
        property=name,
        dtype=subject.dtype,
        device=subject.device,
        status=status,
        seconds=seconds,
        reason=reason,
    )


def examine(subject: Subject, prop: Property, profile: Profile, source: str | None = None) -> Verdict:
    """Puts a subject through a property and says what came of it; never raises for what a candidate does."""
    verdict = verdict_on(subject, prop.name, "not supported")
    reason = prop.inapplicable(subject) or (LEFT_TO_PARTS if prop.of_parts and _is_of_parts(subject, profile) else "")
    if reason:
        return replace(verdict, reason=reason)
    start, ledger, seat = time.monotonic(), Ledger(), Seat(subject, 0)
    seat.printed()  # by an earlier property
    violation, failing = explore(subject, prop, profile, ledger)
    statistics = {key: errors.statistics() for key, errors in ledger.errors.items()}
    if violation is None:
        violation, failing = pooled_violation(ledger), ledger.cases
    verdict = replace(
        verdict,
        status="pass",
        cases=len(ledger.cases),
        seconds=time.monotonic() - start,
        statistics=statistics,
        fingerprints=ledger.fingerprints,
        rounding=ledger.rounding if ledger.errors else "",
    )
    if violation is not None:
        status = violation.status if isinstance(violation, Lost) else "fail"
        details = (*violation.details, *(_weaker_claim(subject, prop, failing) if status == "fail" else ()))
        failure = Failure(
            violation.message, violation.diagnosis, details, tuple(case.to_json() for case in failing),
            script_for(subject, prop.name, failing, violation.message, source), seat.printed(),
        )  # fmt: skip
        return replace(verdict, status=status, reason=violation.message, failure=failure)
    sparing = _is_sparing(subject, profile)
    coverage = measure(
        subject.contract, ledger.cases, _demand(subject, prop, profile), sparing=sparing, seen=_fitted(subject, prop)
    )
    if coverage is not None and subject.implementation.only:
        coverage = replace(coverage, of=f"{coverage.of} where {subject.implementation.only}")
    verdict = replace(verdict, coverage=coverage)
    if coverage is not None and coverage.lacking:
        return replace(verdict, status="warning", reason=f"visits only {coverage}: the time was up")
    if (verdict.worst or 0) > WARNING:
        worst = max(statistics, key=lambda key: statistics[key].worst)
        return replace(verdict, status="warning", reason=f"{worst} uses {statistics[worst].worst:.0%} of its budget")
    return verdict


def _weaker_claim(subject: Subject, prop: Property, failing: list[Case]) -> tuple[str, ...]:
    """Says so if what fails strict rounding meets the eager one."""
    weaker = replace(subject, implementation=replace(subject.implementation, rounding="eager"))
    ledger = Ledger()
    if subject.implementation.rounding != "strict" or subject.dtype == "float32":
        return ()
    met = all(check(weaker, prop, case, ledger) is None for case in failing) and not pooled_violation(ledger)
    if met and ledger.errors:
        return ('rounding="eager" is met, "strict" is not: results are rounded to the dtype between operations',)
    return ()


def _is_sparing(subject: Subject, profile: Profile) -> bool:
    return profile.sparing and is_built_in(subject.implementation)


def _is_of_parts(subject: Subject, profile: Profile) -> bool:
    """Whether it is a model of ours, or a step of one, whose parts are judged for themselves; but for the reference."""
    is_reference = subject.implementation.kind == "reference" and subject.implementation.framework == "torch"
    return subject.contract.rigid and not is_reference and _is_sparing(subject, profile)


def _regimes(subject: Subject, prop: Property, profile: Profile) -> list[str]:
    """Those of a property's cases; in float16 some of ours, which visit all in bfloat16, visit the main one alone.

    Models, whose kernels are judged there in every regime, each by a contract of its own; and references, which round once.
    """
    regimes, ours = prop.regimes_of(subject.contract), subject.implementation
    is_half_done = (
        subject.dtype == "float16" and "bfloat16" in ours.dtypes and (subject.contract.rigid or ours.kind == "reference")
    )
    return regimes[:1] if is_half_done and _is_sparing(subject, profile) else regimes


def _demand(subject: Subject, prop: Property, profile: Profile) -> Demand:
    """What a property is to visit; what is not about numbers visits classes alone in all dtypes but the first."""
    again = subject.dtype != subject.implementation.dtypes[0] and not prop.every_dtype
    return Demand(1 if again else prop.covers + profile.more, subject.implementation.framework == "jax", prop.layouts)


def _fitted(subject: Subject, prop: Property) -> Callable[[Case], Case]:
    """What becomes of a case whose sizes must divide evenly among the most devices that it is judged on."""
    if not subject.implementation.world_sizes:
        return lambda case: case
    most = max(prop.world_sizes(subject.implementation))
    return lambda case: case.replace(**fit(subject.sharding, case.parameters, most))


def pooled_violation(ledger: Ledger) -> Violation | None:
    """What all cases of a property show together, though none of them alone."""
    for key, errors in ledger.errors.items():
        each = errors.statistics()
        if each.worst > 1:
            return Violation(
                f"{key}: pooled over {len(ledger.cases)} cases, {name_worst(each)}", "", (describe_statistics(each),)
            )
    return None


def explore(subject: Subject, prop: Property, profile: Profile, ledger: Ledger) -> tuple[Violation | None, list[Case]]:
    """Runs a property on cases that cover, then on drawn ones, one regime after the other, up to the first violation, which is
    shrunk. Three quarters of a verdict's time are for this; what is not visited then is missing in its coverage.
    """
    jax = subject.implementation.framework == "jax"
    most = prop.weight * subject.contract.cases * (profile.compiled_examples if jax else profile.examples)
    is_of_parts = _is_of_parts(subject, profile)
    outcomes: dict[Case, Violation | None] = {}
    stop_at, out_of_time = math.inf, time.monotonic() + profile.verdict_seconds
    time_is_up = time.monotonic() + 0.75 * profile.verdict_seconds

    def attempt(case: Case) -> None:
        nonlocal stop_at
        if case not in outcomes:
            if time.monotonic() > stop_at:
                return  # time is up: nothing smaller is tried, and Hypothesis settles on the smallest known failure
            counted = Ledger(deadline=min(out_of_time, stop_at + SLOW_SECONDS))
            outcome = check(subject, prop, case, counted, sparing=is_of_parts)
            if isinstance(outcome, OutOfTime):
                seconds = f"{profile.verdict_seconds:.0f} s"
                late = Lost(f"within {seconds} only {len(ledger.cases)} cases could be judged", "timeout")
                outcome = late if stop_at == math.inf else None  # that something smaller fails is not known
            outcomes[case] = outcome
            if outcomes[case] is not None:
                worth_shrinking = not isinstance(outcomes[case], Lost)
                stop_at = min(stop_at, time.monotonic() + profile.shrink_seconds * worth_shrinking)
            elif stop_at == math.inf:
                ledger.cases.append(case)
                ledger.include(counted)
        violation = outcomes[case]
        if violation is not None:
            raise violation.with_traceback(None)  # always from this line, by which Hypothesis tells failures apart

    for position, regime in enumerate(_regimes(subject, prop, profile)):
        examples = round(most if position == 0 else most / 2)
        demand, sparing = _demand(subject, prop, profile), _is_sparing(subject, profile)
        contract = subject.contract
        chosen = few_visits(contract, regime, demand, examples) if sparing else visits(contract, regime, demand)
        layouts: SearchStrategy[tuple[Layout, str]] = st.just(("contiguous", ""))
        if prop.layouts:
            chosen, layouts = laid_out(contract, chosen, sparing=sparing), st.sampled_from(layouts_of(contract))
            if is_of_parts and contract.gradients:  # every layout is visited with gradients or without
                chosen = chosen["differentiable" in prop.needs :: 2]
        try:
            for case in chosen:
                if time.monotonic() < time_is_up:
                    attempt(case)
            drawn = other_values(chosen) if jax else cases(contract, regime)
            if examples and not sparing and time.monotonic() < time_is_up:
                _search(in_memory(drawn, layouts), attempt, profile, examples)
        except Violation:
            if profile.shrink_seconds:
                with suppress(Violation):  # look for something smaller: without landmarks, across which Hypothesis cannot shrink
                    drawn = cases(contract, regime, "landmarks" if jax else "free")
                    _search(in_memory(drawn, layouts), attempt, profile, SHRINK_EXAMPLES)
            failed = {case: violation for case, violation in outcomes.items() if violation is not None}
            smallest = min(failed, key=size_of)
            ledger.cases.append(smallest)
            return failed[smallest], [smallest]
    return None, []


def _search(drawn: SearchStrategy[Case], attempt: Callable[[Case], None], profile: Profile, examples: int) -> None:
    """Lets Hypothesis draw cases, and shrink what fails."""
    search = settings(
        max_examples=examples, derandomize=profile.derandomize, database=None, deadline=None, report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink), print_blob=False,
    )(given(drawn)(lambda case: attempt(case)))  # fmt: skip
    search()


def other_values(points: Sequence[Case]) -> SearchStrategy[Case]:
    """The same cases with other seeds."""
    return st.builds(lambda case, seed: case.replace(seed=seed), st.sampled_from(points), st.integers(0, 2**16))


def in_memory(drawn: SearchStrategy[Case], layouts: SearchStrategy[tuple[Layout, str]]) -> SearchStrategy[Case]:
    """The cases, each with one of the layouts."""
    return st.builds(lambda case, layout: case.replace(layout=layout[0], laid_out=layout[1]), drawn, layouts)


def size_of(case: Case) -> tuple[float, str]:
    """How much there is to look at in a case; a stable order."""
    numbers = [value for value in case.parameters.values() if isinstance(value, int) and not isinstance(value, bool)]
    return math.prod(max(1, each) for each in numbers) + math.log1p(case.seed) / 100, repr(case)


def check(subject: Subject, prop: Property, case: Case, ledger: Ledger, *, sparing: bool = False) -> Violation | None:
    """One property on one case, at each number of devices that it is about; `sparing` as of `Trial`."""
    for size in prop.world_sizes(subject.implementation):
        fitting = Case(**{**case.to_json(), **fit(subject.sharding, case.parameters, size)}) if size else case
        violation = violation_of(prop, Trial(subject, fitting, ledger, size, sparing=sparing))
        if violation is not None:
            if size:
                violation.message = f"on {size} {'device' if size == 1 else 'devices'}: {violation.message}"
            return violation
    return None
