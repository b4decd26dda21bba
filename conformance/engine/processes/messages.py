"""What the judge says to a candidate's process."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """The ranks that a process is one of: they meet at the store of `host` and `port`, under keys of the generation."""

    host: str
    port: int
    generation: str
    rank: int
    size: int


@dataclass(frozen=True)
class Settings:
    """What a process must know before its first call.

    Attributes:
        device: "cpu" or "cuda".
        memory: Bytes of address space that it may take beyond what it begins with; None without limit.
        group: Where it is one of several ranks.
    """

    device: str
    memory: int | None
    group: Group | None = None


@dataclass(frozen=True)
class Request:
    """A call, its tensors being placed in the arena.

    Attributes:
        number: Under which its results are kept.
        implementation: A row of the registry whose function can be loaded here.
        inputs, cotangents: Where they are; cotangents or None.
        call: All else of the call.
        conditions: Of `perform`.
        most_bytes: What results may take; they are described, and not sent, if they take more.
        written: The part of the arena whose bytes the judge wants to see after the call; None if it does not.
    """

    number: int
    implementation: Any
    inputs: Mapping[str, Any]
    cotangents: Mapping[str, Any] | None
    call: Any
    conditions: Any
    most_bytes: int
    written: tuple[int, int] | None = None


@dataclass(frozen=True)
class Again:
    """Asks what now stands in the memory of the results of an earlier call."""

    number: int
    most_bytes: int


@dataclass(frozen=True)
class Describe:
    """Asks what these files and modules register; or, with none, the modules of installed packages."""

    sources: tuple[str, ...]
