"""What a planted bug is, and how it is planted."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import torch

from gaugeblock.conformance.engine.registry import Implementation, import_folder
from gaugeblock.conformance.engine.trial import Subject

Kind = Literal["structural", "boundary", "precision", "state", "memory", "gradient", "error-contract"]

KINDS: tuple[Kind, ...] = get_args(Kind)
_planted: dict[tuple[str, str], "Fault"] = {}


@dataclass(frozen=True)
class Fault:
    """A bug of the field, planted into a kernel that is right but for it.

    Attributes:
        name: Of the fault, and of the implementation that has it.
        contract: What that implementation claims to fulfil.
        candidate: Makes the implementation, anew for each trial, so that no state survives from the last.
        caught_by: The property that must fail, within the `quick` profile's number of examples.
        kind: The class of bug.
        source: Where the bug was met, if that is public.
        summary: One sentence.
        smallest: Product of the sizes of the smallest case that can fail, where that is known.
        claims: Fields of `Implementation` other than the defaults.
    """

    name: str
    contract: str
    candidate: Callable[[], Callable[..., Any]]
    caught_by: str
    kind: Kind
    source: str
    summary: str
    smallest: int | None = None
    claims: Mapping[str, Any] = field(default_factory=dict)

    def subject(self) -> Subject:
        """A fresh implementation with this bug, on trial."""
        implementation = Implementation(self.contract, self.name, self.candidate(), **self.claims)
        return Subject(implementation, implementation.dtypes[0], "cpu")


def fault(
    contract: str, *, caught_by: str, kind: Kind, source: str = "", smallest: int | None = None, **claims: Any
) -> Callable[[type], type]:
    """Registers a class whose instances are implementations of `contract` with one bug, told in its docstring.

    Args are the fields of `Fault`; the fault is named after the class: `GateAndUpSwapped` is `gate-and-up-swapped`.
    """

    def register(candidate: type) -> type:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", candidate.__name__).lower()
        plant(Fault(name, contract, candidate, caught_by, kind, source, str(candidate.__doc__), smallest, claims))
        return candidate

    return register


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
