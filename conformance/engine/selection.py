"""Which subjects a run is about: candidates or built-in implementations, at each dtype and device that they claim."""

from dataclasses import dataclass
from fnmatch import fnmatch

from gaugeblock.conformance.engine.devices import available_devices
from gaugeblock.conformance.engine.implementation import Candidate, Implementation
from gaugeblock.conformance.engine.processes.loading import describe_candidates
from gaugeblock.conformance.engine.registry import RegistrationError, contracts, implementations
from gaugeblock.conformance.engine.trial import Subject


@dataclass(frozen=True)
class Filters:
    """What to keep; an empty tuple keeps all. Contracts and implementations are globs."""

    contracts: tuple[str, ...] = ()
    implementations: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()

    def keeps(self, subject: Subject) -> bool:
        """Whether a subject passes every filter."""
        implementation = subject.implementation
        return (
            (not self.contracts or any(fnmatch(implementation.contract, each) for each in self.contracts))
            and (not self.implementations or any(fnmatch(implementation.name, each) for each in self.implementations))
            and (not self.dtypes or subject.dtype in self.dtypes)
            and (not self.devices or subject.device in self.devices)
        )


def subjects_of(candidates: tuple[str, ...], filters: Filters) -> list[tuple[Subject, str | None]]:
    """Subjects and their sources; without candidates, all that is built in or installed.

    Raises:
        RegistrationError: If a candidate cannot be registered.
    """
    check_filters(filters)
    if candidates:
        found = [(each, source_of(each)) for each in describe_candidates(candidates)]
    else:
        describe_candidates(())
        found = [(each, source_of(each)) for name in contracts() for each in implementations(name)]
    subjects = [
        (Subject(implementation, dtype, device), source)
        for implementation, source in found
        for device in implementation.devices
        if device in available_devices()
        for dtype in implementation.dtypes
    ]
    kept = [(subject, source) for subject, source in subjects if filters.keeps(subject)]
    order = list(contracts())
    return sorted(kept, key=lambda each: (order.index(each[0].implementation.contract), each[0].device, each[0].dtype))


def source_of(implementation: Implementation) -> str | None:
    """The file or module that it is loaded from; None if it is built in."""
    return implementation.function.source if isinstance(implementation.function, Candidate) else None


def check_filters(filters: Filters) -> None:
    """The names in a filter must exist.

    Raises:
        RegistrationError: If a contract filter fits nothing.
    """
    for pattern in filters.contracts:
        if not any(fnmatch(name, pattern) for name in contracts()):
            raise RegistrationError(f"no contract fits {pattern!r}; known: {', '.join(contracts())}")
