"""What a right variant is, and all of them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.registry import import_folder
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.conformance.engine.vocabulary import DTYPES, DType
from gaugeblock.conformance.selftest.fault import contract_of, name_of, right_kernels

LOG2_E = 1.4426950408889634
_variants: list["Variant"] = []


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A right implementation."""

    name: str
    """Of the implementation."""
    contract: str
    """What it fulfils."""
    candidate: Callable[[], Callable[..., Any]]
    """Makes it."""
    summary: str
    """How it differs, in one sentence."""
    fits: Callable[[Case], bool]
    """Whether it is made for a case: some have no groups of one expert, or want aligned sizes."""
    claims: Mapping[str, Any]
    """Fields of `Implementation` other than the defaults."""
    oracle: bool = False
    """Whether it is another's, and computes in float64 what it is given in float64: `tests/test_oracles.py` compares."""

    def subjects(self) -> list[Subject]:
        """The variant at each of its dtypes."""
        implementation = Implementation(self.contract, self.name, self.candidate(), **self.claims)
        return [Subject(implementation, dtype, "cpu") for dtype in implementation.dtypes]


def every_case(case: Case) -> bool:
    """Fits every case."""
    return True


def right(
    contract: str = "",
    *,
    fits: Callable[[Case], bool] = every_case,
    dtypes: tuple[DType, ...] = DTYPES,
    oracle: bool = False,
    **claims: Any,
) -> Callable[[type], type]:
    """Registers a class whose instances are right implementations of `contract`, by default the one that the class names as its
    attribute; the fields are those of `Variant`."""

    def register(candidate: type) -> type:
        _variants.append(
            Variant(
                name=name_of(candidate),
                contract=contract or contract_of(candidate),
                candidate=candidate,
                summary=str(candidate.__doc__),
                fits=fits,
                claims={"dtypes": dtypes} | claims,
                oracle=oracle,
            )
        )
        return candidate

    return register


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Every right variant: simulated kernels, others derived from them, modules of public libraries where they are installed."""
    from gaugeblock.conformance.peers.peer import peers  # which registers its right ones here

    for kernel in right_kernels():
        right(**getattr(kernel, "claims", {}))(kernel)
    import_folder("gaugeblock.conformance.selftest.right")
    peers()
    return tuple(_variants)
