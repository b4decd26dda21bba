"""What is on trial, one case of it, and what a property is."""

import hashlib
import importlib.util
import inspect
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from gaugeblock.conformance.engine.budget.error_budget import Errors
from gaugeblock.conformance.engine.budget.oracle import rounded_cotangents
from gaugeblock.conformance.engine.contract import Contract, ContractError
from gaugeblock.conformance.engine.devices import available_world_size, triton_is_interpreted
from gaugeblock.conformance.engine.frameworks import BadResult, Call, Raised
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import Case, Layout, lay_out, make_inputs, options, take
from gaugeblock.conformance.engine.judging.diagnosis import diagnose
from gaugeblock.conformance.engine.judging.judge import Violation, check_form, judge
from gaugeblock.conformance.engine.only import narrowed
from gaugeblock.conformance.engine.processes.handle import Lost
from gaugeblock.conformance.engine.processes.perform import Conditions, Findings
from gaugeblock.conformance.engine.processes.seats import Seat
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.engine.shardings import Sharding
from gaugeblock.conformance.engine.vocabulary import FRAMEWORKS, ROUNDINGS, Device, Framework, Rounding, Tensors


class OutOfTime(Lost):
    """The property has taken too long; the candidate's process is well."""


@dataclass(frozen=True)
class Subject:
    """What is on trial: an implementation at one dtype on one device."""

    implementation: Implementation
    dtype: str
    device: str

    @property
    def contract(self) -> Contract:
        """The contract that it claims to fulfil, with such sizes and options alone as it takes."""
        contract = find_contract(self.implementation.contract)
        return narrowed(contract, self.implementation.only) if self.implementation.only else contract

    @property
    def sharding(self) -> Sharding:
        """How its tensors lie over ranks."""
        return find_contract(self.implementation.contract).sharding(self.implementation.sharding)

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
        if implementation.kind == "triton" and self.device == "cpu" and not triton_is_interpreted():
            return "on the CPU Triton kernels run only in the interpreter (TRITON_INTERPRET=1)"
        return ""


_not_strict: set[tuple[str, str, str]] = set()  # contract, name and dtype of what was seen to need eager rounding


@dataclass
class Ledger:
    """What the cases of one property add up to."""

    cases: list[Case] = field(default_factory=list)
    errors: dict[str, Errors] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    rounding: Rounding = "strict"  # the tightest that every case met
    deadline: float = math.inf  # as `time.monotonic` counts

    def add(self, errors: dict[str, Errors]) -> None:
        """Pools the errors of one more case."""
        self.errors |= {key: self.errors.get(key, Errors()) + each for key, each in errors.items()}

    def include(self, other: "Ledger") -> None:
        """Adds what another ledger counted, but for its cases."""
        self.add(other.errors)
        self.fingerprints |= other.fingerprints
        self.rounding = max(self.rounding, other.rounding, key=ROUNDINGS.index)


class Trial:
    """One case of one subject, with the verbs that properties are written in.

    Tensors are held on the CPU; the candidate gets copies, on its device.

    Attributes:
        findings: What was seen during the last call besides its results.
        cotangents: What the last run that took gradients was given for its outputs.
        sparing: Whether less is visited, since the parts of what is on trial are visited for themselves.
    """

    findings: Findings
    cotangents: Tensors

    def __init__(
        self, subject: Subject, case: Case, ledger: Ledger | None = None, world_size: int = 0, *, sparing: bool = False
    ) -> None:
        self.subject, self.case, self.ledger, self.world_size = subject, case, ledger or Ledger(), world_size
        self.sparing = sparing
        self.contract, self.implementation = subject.contract, subject.implementation
        self.seat = Seat(subject, world_size)

    def inputs(self, case: Case | None = None) -> Tensors:
        """Fresh contiguous inputs of the case (or another)."""
        made = make_inputs(self.contract, case or self.case, self.subject.dtype)
        return {key: tensor.clone() for key, tensor in made.items()}

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
        same_memory: bool = False,
        write_back: bool = False,
        **conditions: Any,
    ) -> Tensors:
        """Outputs, and gradients if asked for (of all inputs, or those `wanted`), of the case's inputs or the given ones.

        Args:
            same_memory: The inputs lie where those of the call before lay.
            write_back: What the candidate writes to its inputs is written to `inputs`, what it writes to cotangents to
                `self.cotangents`; else they stay as they are.
            **conditions: Of the call: fields of `Conditions`.
        """
        case = case or self.case
        inputs = self.inputs(case) if inputs is None else inputs
        cotangents = None
        if gradients and self.contract.differentiable(inputs):
            made = rounded_cotangents(self.contract, case, self.subject.dtype)
            self.cotangents = cotangents = {key: lay_out(tensor, cotangent_layout) for key, tensor in made.items()}
        some = None if wanted is None else tuple(wanted)
        call = Call(inputs, self.options(case), cotangents, some, self.implementation.jit)
        results = self.call(call, same_memory=same_memory, write_back=write_back, **conditions)
        self._check_form(results, inputs, case)
        return results

    def call(self, call: Call, *, same_memory: bool = False, write_back: bool = False, **conditions: Any) -> Tensors:
        """The candidate called once; copies of what it returned, of all ranks where there are several."""
        if time.monotonic() > self.ledger.deadline:
            raise OutOfTime("the time for this property is up", "timeout")
        when = Conditions(world_size=self.world_size, **conditions)
        answer = self.seat.call(self.case.parameters, call, when, same_memory=same_memory, write_back=write_back)
        self.findings = answer.findings
        return answer.results

    def _check_form(self, results: Tensors, inputs: Tensors, case: Case) -> None:
        """What is wrong in its form can be neither compared nor taken apart; sizes are those of the inputs that were given."""
        specs, sizes = self.contract.specs(case.parameters), dict[str, int]()
        for key, tensor in inputs.items():
            sizes |= {name: size for name, size in zip(specs[key].shape, tensor.shape, strict=False) if isinstance(name, str)}
        check_form(self.contract, case.replace(**sizes), self.subject.dtype, "cpu", results, self.implementation.framework)

    def last(self) -> Any:
        """The last call, to be asked for `again`."""
        return self.seat.last()

    def again(self, call: Any) -> Tensors:
        """What now stands in the candidate's own memory where it returned the results of an earlier call."""
        return self.seat.again(self.case.parameters, call)

    def take(self, tensors: Tensors, dimension: str, index: torch.Tensor) -> Tensors:
        """The inputs or outputs with the positions `index` along a named dimension; others unchanged."""
        return take(self.contract, self.case.parameters, tensors, dimension, index)

    def examples(self, results: Tensors, index: torch.Tensor) -> Tensors:
        """The outputs at the positions `index` of the batch, without those that have no examples: a load is of all of them."""
        batch = self.contract.batch
        of_examples = {key: each for key, each in results.items() if batch in self.contract.spec(key, self.case.parameters).shape}
        if not of_examples:
            raise ContractError(f"{self.contract.name}: no output has the dimension {batch!r}: tell it in `without`")
        return self.take(of_examples, batch, index)

    def judge(self, results: Tensors, case: Case | None = None) -> None:
        """Form, choice and values of the results, against the oracle of the case."""
        case = case or self.case
        check_form(self.contract, case, self.subject.dtype, "cpu", results, self.implementation.framework)
        errors, rounding = self._judged(results, case)
        self.ledger.add(errors)
        self.ledger.rounding = max(self.ledger.rounding, rounding, key=ROUNDINGS.index)

    def _judged(self, results: Tensors, case: Case) -> tuple[dict[str, Errors], Rounding]:
        """Errors under the claimed rounding, and the tightest that is met."""
        dtype, subject = self.subject.dtype, (self.implementation.contract, self.implementation.name, self.subject.dtype)
        claimed: Rounding = "strict" if dtype == "float32" else self.implementation.rounding  # in float32 they are the same
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
            if key not in results or results[key].shape != tensor.shape:
                now = f"shape {tuple(results[key].shape)}" if key in results else "none"
                raise Violation(f"{key} has shape {tuple(tensor.shape)}, and {now} {when}")
            if not torch.equal(_bits(tensor), _bits(results[key])):
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
        total.update(_bits(tensors[key]).numpy().tobytes())
    return total.hexdigest()[:12]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Property:
    """One thing that must hold for every case."""

    name: str
    """Of the property, and of its file `test_<name>.py`."""
    check: Callable[[Trial], None]
    """Raises `Violation` where it does not hold for a trial."""
    statement: str
    """The docstring of `check`."""
    regimes: str = "main"
    """`"main"`: the contract's first regime; `"differentiable"`, `"all"`: those."""
    needs: tuple[str, ...] = ()
    """Claims of the implementation without which it is not tested; `no claim` for one with which it is not."""
    weight: float = 1.0
    """Cases per regime, in units of the profile's examples."""
    frameworks: tuple[Framework, ...] = FRAMEWORKS
    kinds: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    """Those it makes sense for; none means all."""
    requires: tuple[str, ...] = ()
    """Attributes of the contract without which there is nothing to test."""
    every_world_size: bool = False
    """It is about all the world sizes that an implementation claims, not one of them."""
    every_dtype: bool = False
    """It is about numbers: what holds in one dtype says little of another."""
    covers: int = 1
    """Of how many factors' classes every combination is visited: 1 each class, 2 each pair of classes."""
    layouts: bool = False
    """Its cases are dealt every layout of all arguments, and of each alone."""
    of_parts: bool = False
    """What holds of each kernel holds of what is composed of them: it is about the memory that a kernel reads and writes, the
    order of its programs, or which gradients it makes."""

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
        claims = [(claim.removeprefix("no "), not claim.startswith("no ")) for claim in self.needs]
        for claim, needed in claims:
            if bool(getattr(implementation, claim)) != needed:
                return f"claims {claim}={not needed}"
        if implementation.framework not in self.frameworks:
            return f"not judged for {implementation.framework}"
        if self.kinds and implementation.kind not in self.kinds:
            return f"only for implementations of kind {', '.join(self.kinds)}"
        if self.devices and subject.device not in self.devices:
            return f"needs {', '.join(self.devices)}"
        if not self.world_sizes(implementation):
            return f"needs {min(implementation.world_sizes)} devices, there are {available_world_size(implementation.framework)}"
        return ""

    def world_sizes(self, implementation: Implementation) -> tuple[int, ...]:
        """On how many devices a case is judged: by default on the fewest that are several, of those that there are."""
        if not implementation.world_sizes:
            return (0,)
        most = available_world_size(implementation.framework)
        sizes = tuple(size for size in implementation.world_sizes if size <= most)
        return sizes if self.every_world_size else tuple(sorted(sizes, key=lambda size: (size == 1, size))[:1])

    def regimes_of(self, contract: Contract) -> list[str]:
        """The regimes that its cases are drawn from."""
        if self.regimes == "main":
            return [contract.regimes[0].name]
        return [each.name for each in contract.regimes if self.regimes == "all" or each.differentiable]


def violation_of(prop: Property, trial: Trial) -> Violation | None:
    """How a property fails in a trial; what the candidate raises is a violation too, what the engine raises is not."""
    try:
        prop.check(trial)
    except Violation as violation:
        return violation
    except BadResult as error:
        return Violation(str(error))
    except Raised as error:
        return Violation(str(error), error.place)
    return None
