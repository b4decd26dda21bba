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
    """What a process must know before its first call."""

    device: str
    """"cpu" or "cuda"."""
    memory: int | None
    """Bytes of address space that it may take beyond what it begins with; None without limit."""
    group: Group | None = None
    """Where it is one of several ranks."""


@dataclass(frozen=True)
class Request:
    """A call, its tensors being placed in the arena."""

    number: int
    """Under which its results are kept."""
    implementation: Any
    """A row of the registry whose function can be loaded here."""
    inputs: Mapping[str, Any]
    cotangents: Mapping[str, Any] | None
    """Where they are; cotangents or None."""
    call: Any
    """All else of the call."""
    conditions: Any
    """Of `perform`."""
    most_bytes: int
    """What results may take; they are described, and not sent, if they take more."""
    written: tuple[int, int] | None = None
    """The part of the arena whose bytes the judge wants to see after the call; None if it does not."""


@dataclass(frozen=True)
class Again:
    """Asks what now stands in the memory of the results of an earlier call."""

    number: int
    most_bytes: int


@dataclass(frozen=True)
class Describe:
    """Asks what these files and modules register; or, with none, the modules of installed packages."""

    sources: tuple[str, ...]
    optional: frozenset[str] = frozenset()
    """Those of them that may register nothing."""
    others: frozenset[str] = frozenset()
    """Files that speak for themselves, though these may import them."""
