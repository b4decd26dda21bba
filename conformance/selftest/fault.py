"""What a planted bug is, and how it is planted."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import torch

from gaugeblock.conformance.engine.implementation import CLAIMS, Implementation
from gaugeblock.conformance.engine.property_names import property_names
from gaugeblock.conformance.engine.registry import import_folder
from gaugeblock.conformance.engine.suggestion import suggest
from gaugeblock.conformance.engine.trial import Subject

Kind = Literal["structural", "boundary", "precision", "state", "memory", "gradient", "error-contract"]

KINDS: tuple[Kind, ...] = get_args(Kind)
_planted: dict[tuple[str, str], "Fault"] = {}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A bug of the field, planted into a kernel that is right but for it."""

    name: str
    """Of the fault, and of the implementation that has it."""
    contract: str
    """What that implementation claims to fulfil."""
    candidate: Callable[[], Callable[..., Any]]
    """Makes the implementation, anew for each trial, so that no state survives from the last."""
    caught_by: str
    """The property that must fail, within the `quick` profile's number of examples."""
    kind: Kind
    """The class of bug."""
    source: str = ""
    """Where the bug was met, if that is public."""
    summary: str
    """One sentence."""
    smallest: int | None = None
    """Product of the sizes of the smallest case that can fail, where that is known."""
    claims: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Implementation` other than the defaults."""

    def __post_init__(self) -> None:
        for name, value, known in (("caught_by", self.caught_by, property_names()), ("kind", self.kind, KINDS)):
            if value not in known:
                raise ValueError(f"{self.contract} ({self.name}): {name}: unknown {value!r}{suggest(value, known)}")

    def subject(self) -> Subject:
        """A fresh implementation with this bug, on trial."""
        implementation = Implementation(self.contract, self.name, self.candidate(), **self.claims)
        return Subject(implementation, implementation.dtypes[0], "cpu")


def fault(contract: str = "", **fields: Any) -> Callable[[type], type]:
    """Registers a class whose instances are implementations of a contract with one bug, told in its docstring.

    Args are fields of `Fault`, and claims; the contract is by default that of the right kernel which the class is derived from.
    The fault is named after the class: `GateAndUpSwapped` is `gate-and-up-swapped`.
    """

    def register(candidate: type) -> type:
        told: dict[str, Any] = {
            "name": name_of(candidate),
            "contract": contract or contract_of(candidate),
            "summary": candidate.__doc__,
        }
        claims = {name: value for name, value in fields.items() if name in CLAIMS and name != "kind"}
        own: dict[str, Any] = {name: value for name, value in fields.items() if name not in claims}
        plant(Fault(**told, **own, candidate=candidate, claims=claims))
        return candidate

    return register


def name_of(candidate: type) -> str:
    """A class's name as that of an implementation."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", candidate.__name__).lower()


def contract_of(candidate: type) -> str:
    """What the right kernel fulfils that a class is derived from."""
    return str(candidate.contract)  # type: ignore[attr-defined]


@cache
def right_kernels() -> tuple[type, ...]:
    """The kernels that bugs are planted into: the classes of `simulated/` that name a contract of their own."""
    modules = import_folder("gaugeblock.conformance.selftest.simulated")
    members = [member for module in modules for member in vars(module).values()]
    kernels = [each for each in members if isinstance(each, type) and "contract" in vars(each)]
    return tuple(dict.fromkeys(kernels))


def plant(planted: Fault) -> None:
    """Takes a fault into the list; names are unique within a contract."""
    key = planted.contract, planted.name
    if key in _planted:
        raise ValueError(f"{planted.contract}: two faults are named {planted.name!r}")
    _planted[key] = planted


@cache
def faults() -> tuple[Fault, ...]:
    """Every planted bug."""
    import_folder("gaugeblock.conformance.selftest.planted")
    return tuple(_planted.values())


@contextmanager
def process_kept() -> Iterator[None]:
    """Puts back what some bugs leave changed in the process."""
    dtype, threads, random_state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
