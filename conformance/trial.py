"""One implementation put through one property: draw cases, call, judge, keep the statistics, shrink what fails."""

import hashlib
import importlib.util
import inspect
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from gaugeblock.conformance.cases import Case, Layout, cases, lay_out, make_inputs, options, take
from gaugeblock.conformance.contract import Contract, Tensors
from gaugeblock.conformance.devices import available_world_size, triton_is_interpreted
from gaugeblock.conformance.diagnosis import diagnose
from gaugeblock.conformance.error_budget import Errors
from gaugeblock.conformance.frameworks import BadResult, Call
from gaugeblock.conformance.judge import Violation, check_form, describe_statistics, judge, name_worst
from gaugeblock.conformance.oracle import rounded_cotangents
from gaugeblock.conformance.ranks.pool import RanksLost, pool
from gaugeblock.conformance.ranks.world import JaxDevices, World, fit
from gaugeblock.conformance.registry import Implementation, find_contract, one_line
from gaugeblock.conformance.reproduction import script_for
from gaugeblock.conformance.triton_checks.interpreter import Watch, watch
from gaugeblock.conformance.verdict import Failure, Verdict

WARNING = 0.9  # of a limit: a right implementation has an rms of about 1 deviation, which is 0.83 of its limit
SHRINK_EXAMPLES = 400  # cases drawn in search of a smaller failure, if time allows


@dataclass(frozen=True)
class Profile:
    """How long the gate may take.

    Attributes:
        examples: Drawn cases of the main regime, and as many landmarks, per unit of a property's weight; half as many of
            each other regime.
        compiled_examples: The same for JAX, which compiles for every new shape and so draws landmarks only.
        shrink_seconds: How long a failure may be shrunk.
        verdict_seconds: How long one property of one subject may take before its process is killed.
        derandomize: The same cases every time; else new ones.
    """

    name: str
    examples: int
    compiled_examples: int
    shrink_seconds: float
    verdict_seconds: float
    derandomize: bool = True


PROFILES = {
    each.name: each
    for each in (
        Profile("quick", examples=4, compiled_examples=2, shrink_seconds=4, verdict_seconds=120),
        Profile("ci", examples=20, compiled_examples=6, shrink_seconds=15, verdict_seconds=600),
        Profile("thorough", examples=300, compiled_examples=60, shrink_seconds=120, verdict_seconds=7200, derandomize=False),
    )
}


@dataclass(frozen=True)
class Subject:
    """What is on trial: an implementation at one dtype on one device."""

    implementation: Implementation
    dtype: str
    device: str

    @property
    def contract(self) -> Contract:
        """The contract that it claims to fulfil."""
        return find_contract(self.implementation.contract)

    @property
    def on_ranks(self) -> bool:
        """Whether it is called once per rank, each a process of its own."""
        return bool(self.implementation.world_sizes) and self.implementation.framework == "torch"

    @property
    def untestable(self) -> str:
        """Why it cannot be judged on this machine, or an empty string."""
        implementation = self.implementation
        packages = [name for name in (implementation.framework, implementation.kind) if name in ("torch", "jax", "triton")]
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{missing[0]} is not installed"
        if implementation.kind == "triton" and self.device == "cpu":
            if not triton_is_interpreted():
                return "on the CPU Triton kernels run only in the interpreter (TRITON_INTERPRET=1)"
            if self.dtype == "bfloat16":
                return "Triton's interpreter computes bfloat16 wrongly"
        return ""


_not_strict: set[tuple[str, str, str]] = set()  # contract, name and dtype of what was seen to need the eager profile


@dataclass
class Ledger:
    """What the cases of one property add up to."""

    cases: list[Case] = field(default_factory=list)
    errors: dict[str, Errors] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    profile: str = "strict"  # the tightest that every case met

    def add(self, errors: dict[str, Errors]) -> None:
        """Pools the errors of one more case."""
        self.errors |= {key: self.errors.get(key, Errors()) + each for key, each in errors.items()}

    def include(self, other: "Ledger") -> None:
        """Adds what another ledger counted, but for its cases."""
        self.add(other.errors)
        self.fingerprints |= other.fingerprints
        self.profile = max(self.profile, other.profile, key=("strict", "eager").index)


class Trial:
    """One case of one subject, with the verbs that properties are written in.

    Attributes:
        watched: What Triton kernels did during the last call.
        raw: What the last call returned, in the candidate's own memory; results are copies of it.
    """

    watched: Watch
    raw: Tensors

    def __init__(self, subject: Subject, case: Case, ledger: Ledger | None = None, world: World | None = None) -> None:
        self.subject, self.case, self.ledger, self.world = subject, case, ledger or Ledger(), world or World()
        self.contract, self.implementation = subject.contract, subject.implementation

    def inputs(self, case: Case | None = None) -> Tensors:
        """Fresh contiguous inputs of the case (or another), on the subject's device."""
        made = make_inputs(self.contract, case or self.case, self.subject.dtype)
        return {key: tensor.to(self.subject.device, copy=True) for key, tensor in made.items()}

    def options(self, case: Case | None = None) -> dict[str, Any]:
        """The keyword arguments of the case (or another)."""
        return options(self.contract, case or self.case)

    def run(
        self,
        inputs: Tensors | None = None,
        *,
        gradients: bool = False,
        wanted: Iterable[str] | None = None,
        case: Case | None = None,
        cotangent_layout: Layout = "contiguous",
    ) -> Tensors:
        """Outputs, and gradients if asked for (of all inputs, or those `wanted`), of the case's inputs or the given ones."""
        case = case or self.case
        inputs = self.inputs(case) if inputs is None else inputs
        cotangents = None
        if gradients and self.contract.differentiable(inputs):
            made = rounded_cotangents(self.contract, case, self.subject.dtype)
            cotangents = {key: lay_out(tensor.to(self.subject.device), cotangent_layout) for key, tensor in made.items()}
        some = None if wanted is None else tuple(wanted)
        return self.call(Call(inputs, self.options(case), cotangents, some, self.implementation.jit))

    def call(self, call: Call) -> Tensors:
        """The candidate called once, under watch."""
        with watch(reachable=call.inputs.values()) as self.watched:
            self.raw = self.world.call(self.contract, self.case.parameters, self.implementation, call)
        return self.whole(self.raw)

    def whole(self, raw: Tensors) -> Tensors:
        """Copies of what a call returned, of all ranks where there are several."""
        return self.world.whole(self.contract, self.case.parameters, raw)

    def take(self, tensors: Tensors, dimension: str, index: torch.Tensor) -> Tensors:
        """The inputs or outputs with the positions `index` along a named dimension; others unchanged."""
        return take(self.contract, self.case.parameters, tensors, dimension, index)

    def judge(self, results: Tensors, case: Case | None = None) -> None:
        """Form, choice and values of the results, against the oracle of the case."""
        case = case or self.case
        framework = self.implementation.framework
        device = "cpu" if framework == "jax" else self.subject.device
        check_form(self.contract, case, self.subject.dtype, device, results, framework)
        errors, profile = self.world.agree(lambda: self._judged(results, case))
        self.ledger.add(errors)
        self.ledger.profile = max(self.ledger.profile, profile, key=("strict", "eager").index)

    def _judged(self, results: Tensors, case: Case) -> tuple[dict[str, Errors], str]:
        """Errors under the claimed profile, and the tightest profile that is met."""
        dtype, subject = self.subject.dtype, (self.implementation.contract, self.implementation.name, self.subject.dtype)
        claimed = "strict" if dtype == "float32" else self.implementation.profile  # in float32 they are the same
        errors = judge(self.contract, case, dtype, claimed, results)
        if claimed != "strict" and subject not in _not_strict:
            try:
                judge(self.contract, case, dtype, "strict", results)
                return errors, "strict"
            except Violation:
                _not_strict.add(subject)  # not tried again: a budget costs more than a call
        return errors, claimed

    def fingerprint(self, results: Tensors) -> None:
        """Keeps a digest of the bits, so that two runs of the gate can be compared."""
        self.ledger.fingerprints[repr(self.case)] = digest(results)

    def same_bits(self, results: Tensors, expected: Tensors, when: str) -> None:
        """Every result equals the expected one, bit for bit."""
        for key, tensor in expected.items():
            if digest({key: tensor}) != digest({key: results[key]}):
                different = ~((results[key] == tensor) | (results[key].isnan() & tensor.isnan()))
                count = int(different.sum())
                raise Violation(
                    f"{key}: {count} of {different.numel()} elements differ {when}"
                    if count
                    else f"{key}: signs of zeros or NaN bits differ {when}",
                    diagnose(different.cpu(), None) if count else "",
                )


def digest(tensors: Tensors) -> str:
    """A short digest of the bits of tensors."""
    total = hashlib.sha1(usedforsecurity=False)
    for key in sorted(tensors):
        packed = tensors[key].detach().cpu().clone(memory_format=torch.contiguous_format)
        total.update(packed.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


@dataclass(frozen=True)
class Property:
    """One thing that must hold for every case.

    Attributes:
        name: Of the property, and of its file `test_<name>.py`.
        check: Raises `Violation` where it does not hold for a trial.
        statement: The docstring of `check`.
        regimes: `"main"`: the contract's first regime; `"differentiable"`, `"all"`: those.
        needs: Claims of the implementation without which it is not tested.
        weight: Cases per regime, in units of the profile's examples.
        frameworks, kinds, devices: Those it makes sense for; no kinds means all.
        requires: Attributes of the contract without which there is nothing to test.
        every_dtype: It is about numbers: what holds in one dtype says little of another.
        every_world_size: It is about all the world sizes that an implementation claims, not one of them.
    """

    name: str
    check: Callable[[Trial], None]
    statement: str
    regimes: str = "main"
    needs: tuple[str, ...] = ()
    weight: float = 1.0
    frameworks: tuple[str, ...] = ("torch", "jax")
    kinds: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    requires: tuple[str, ...] = ()
    every_world_size: bool = False
    every_dtype: bool = False

    @property
    def file(self) -> str:
        """The file of its test."""
        return inspect.getfile(self.check)

    def inapplicable(self, subject: Subject) -> str:
        """Why the property is not tested for a subject, or an empty string."""
        implementation, contract = subject.implementation, subject.contract
        if subject.untestable:
            return subject.untestable
        if self.name in contract.without:
            return contract.without[self.name]
        lacking = [name for name in self.requires if not getattr(contract, name)]
        if lacking:
            return f"the contract has no {lacking[0]}"
        missing = [claim for claim in self.needs if not getattr(implementation, claim)]
        if missing:
            return f"claims {missing[0]}={getattr(implementation, missing[0])}"
        if implementation.framework not in self.frameworks:
            return f"not judged for {implementation.framework}"
        if self.kinds and implementation.kind not in self.kinds:
            return f"only for implementations of kind {', '.join(self.kinds)}"
        if subject.device not in self.devices:
            return f"needs {', '.join(self.devices)}"
        if not self.world_sizes(implementation):
            return f"needs {min(implementation.world_sizes)} devices, there are {available_world_size(implementation.framework)}"
        return ""

    def world_sizes(self, implementation: Implementation) -> tuple[int, ...]:
        """On how many devices a case is judged: by default on the fewest that are several, of those that there are."""
        if not implementation.world_sizes:
            return (1,)
        most = available_world_size(implementation.framework)
        sizes = tuple(size for size in implementation.world_sizes if size <= most)
        return sizes if self.every_world_size else tuple(sorted(sizes, key=lambda size: (size == 1, size))[:1])

    def regimes_of(self, contract: Contract) -> list[str]:
        """The regimes that its cases are drawn from."""
        if self.regimes == "main":
            return [contract.regimes[0].name]
        return [each.name for each in contract.regimes if self.regimes == "all" or each.differentiable]


def examine(subject: Subject, prop: Property, profile: Profile, source: str | None = None) -> Verdict:
    """Puts a subject through a property and says what came of it; never raises for what a candidate does."""
    verdict = Verdict(
        subject.implementation.contract, subject.implementation.name, subject.implementation.kind, prop.name, subject.dtype,
        subject.device, "not supported",
    )  # fmt: skip
    reason = prop.inapplicable(subject)
    if reason:
        return replace(verdict, reason=reason)
    start, ledger = time.monotonic(), Ledger()
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
        profile=ledger.profile if ledger.errors else "",
    )
    if violation is not None:
        details = (*violation.details, *_weaker_claim(subject, prop, failing))
        failure = Failure(violation.message, violation.diagnosis, details, tuple(case.to_json() for case in failing))
        failure = replace(failure, script=script_for(subject, prop.name, failing, violation.message, source))
        return replace(verdict, status="fail", reason=violation.message, failure=failure)
    if (verdict.worst or 0) > WARNING:
        worst = max(statistics, key=lambda key: statistics[key].worst)
        return replace(verdict, status="warning", reason=f"{worst} uses {statistics[worst].worst:.0%} of its budget")
    return verdict


def _weaker_claim(subject: Subject, prop: Property, failing: list[Case]) -> tuple[str, ...]:
    """Says so if what fails the strict profile meets the eager one."""
    weaker = replace(subject, implementation=replace(subject.implementation, profile="eager"))
    ledger = Ledger()
    if subject.implementation.profile != "strict" or subject.dtype == "float32":
        return ()
    met = all(check(weaker, prop, case, ledger) is None for case in failing) and not pooled_violation(ledger)
    if met and ledger.errors:
        return ('profile="eager" is met, "strict" is not: results are rounded to the dtype between operations',)
    return ()


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
    """Runs a property on landmarks and drawn cases, one regime after the other, up to the first violation, which is shrunk."""
    jax = subject.implementation.framework == "jax"
    most = prop.weight * subject.contract.cases * (profile.compiled_examples if jax else profile.examples)
    outcomes: dict[Case, Violation | None] = {}
    stop_at = math.inf

    def attempt(case: Case) -> None:
        nonlocal stop_at
        if case not in outcomes:
            if time.monotonic() > stop_at:
                return  # time is up: nothing smaller is tried, and Hypothesis settles on the smallest known failure
            counted = Ledger()
            outcomes[case] = check(subject, prop, case, counted)
            if outcomes[case] is not None:
                worth_shrinking = not isinstance(outcomes[case], RanksLost)
                stop_at = min(stop_at, time.monotonic() + profile.shrink_seconds * worth_shrinking)
            elif stop_at == math.inf:
                ledger.cases.append(case)
                ledger.include(counted)
        violation = outcomes[case]
        if violation is not None:
            raise violation.with_traceback(None)  # always from this line, by which Hypothesis tells failures apart

    for position, regime in enumerate(prop.regimes_of(subject.contract)):
        examples = round(most if position == 0 else most / 2)  # none of free sizes: one landmark is visited all the same
        landmarks = subject.contract.landmarks
        turn = 0 if jax else position % len(landmarks)  # so that where one is visited, each regime visits another
        landmarks = (*landmarks[turn:], *landmarks[:turn])[: max(1, examples)]
        visits = [Case(**each, regime=regime, seed=seed) for seed, each in enumerate(landmarks)]
        try:
            for case in visits:
                attempt(case)
            drawn = cases(subject.contract, regime, "landmarks", len(landmarks)) if jax else cases(subject.contract, regime)
            if examples:
                _search(drawn, attempt, profile, examples)
        except Violation:
            with suppress(Violation):  # look for something smaller: without landmarks, across which Hypothesis cannot shrink
                drawn = cases(subject.contract, regime, "landmarks" if jax else "free")
                _search(drawn, attempt, profile, SHRINK_EXAMPLES)
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


def size_of(case: Case) -> tuple[float, str]:
    """How much there is to look at in a case; a stable order."""
    numbers = [value for value in case.parameters.values() if isinstance(value, int) and not isinstance(value, bool)]
    return math.prod(max(1, each) for each in numbers) + math.log1p(case.seed) / 100, repr(case)


def check(subject: Subject, prop: Property, case: Case, ledger: Ledger) -> Violation | None:
    """One property on one case, at each number of devices that it is about."""
    implementation = subject.implementation
    for size in prop.world_sizes(implementation):
        if not implementation.world_sizes:
            return violation_of(prop, Trial(subject, case, ledger))
        fitting = Case(**{**case.to_json(), **fit(subject.contract, case.parameters, size)})
        if implementation.framework == "jax":
            violation = violation_of(prop, Trial(subject, fitting, ledger, JaxDevices(size)))
        else:
            violation, counted = pool().check(subject, prop, fitting, size)
            ledger.include(counted)
        if violation is not None:
            violation.message = f"on {size} {'device' if size == 1 else 'devices'}: {violation.message}"
            return violation
    return None


def violation_of(prop: Property, trial: Trial) -> Violation | None:
    """How a property fails in a trial; whatever the candidate raises is a violation too."""
    try:
        prop.check(trial)
    except Violation as violation:
        return violation
    except BadResult as error:
        return Violation(str(error))
    except Exception as error:
        return Violation(f"raised {type(error).__name__}: {one_line(error)}")
    return None
