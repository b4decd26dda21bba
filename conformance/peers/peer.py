"""What a peer is: a public library's own code, called as a contract says; and all peers whose libraries are installed."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.only import holds
from gaugeblock.conformance.engine.vocabulary import DType
from gaugeblock.conformance.selftest.fault import name_of
from gaugeblock.conformance.selftest.variant import every_case, right

LIBRARIES = {
    "transformers": "transformers",
    "transformers_layers": "transformers",
    "transformers_clip": "transformers",
    "transformers_decoders": "transformers",
    "transformers_dense": "transformers",
    "transformers_gpt2": "transformers",
    "diffusers": "diffusers",
    "diffusers_flux": "diffusers",
    "diffusers_mmdit": "diffusers",
    "diffusers_unet": "diffusers",
    "diffusers_vae": "diffusers",
    "diffusers_schedulers": "diffusers",
    "liger": "liger-kernel",
    "liger_layers": "liger-kernel",
    "fla": "fla-core",
    "lucidrains": "mmdit",
    "hyper_connections": "hyper-connections",
    "torchtitan": "torchtitan",
}
"""For each module of this folder that holds peers, the distribution that they need."""
IMPORTS = {
    "lucidrains": "mmdit",
    "liger": "liger_kernel",
    "liger_layers": "liger_kernel",
    "transformers_layers": "transformers",
    "transformers_clip": "transformers",
    "transformers_decoders": "transformers",
    "transformers_dense": "transformers",
    "transformers_gpt2": "transformers",
    "diffusers_flux": "diffusers",
    "diffusers_mmdit": "diffusers",
    "diffusers_unet": "diffusers",
    "diffusers_vae": "diffusers",
    "diffusers_schedulers": "diffusers",
}
"""The package that a distribution brings, where it is named otherwise than the module of this folder."""
UNDOCUMENTED: Mapping[str, Any] = {"validates": False, "batch_invariant": False}
"""What none of these libraries promises, unless a peer says that it does."""
_peers: list["Peer"] = []


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One operation of a public library."""

    name: str
    """Of the implementation."""
    library: str
    """The distribution that it is of."""
    contract: str
    """What it is judged by."""
    candidate: Callable[[], Callable[..., Any]]
    """Makes it."""
    claims: Mapping[str, Any]
    """Fields of `Implementation`."""


def peer(
    contract: str,
    *,
    dtypes: tuple[DType, ...],
    right_in: tuple[DType, ...] | None = None,
    fits: Callable[[Case], bool] = every_case,
    oracle: bool = False,
    **claims: Any,
) -> Callable[[type], type]:
    """Registers a class whose instances are on trial, called as `contract` says.

    Args:
        dtypes: Those in which it is on trial.
        right_in: Those in which it is right, and no judgement of it may be a rejection: by default all.
        fits: Of right ones, whether the adapter can ask the library what a case asks.
        oracle: Whether it computes in float64 what it is given in float64: `tests/test_oracles.py` compares.
        **claims: Fields of `Implementation`, over those of `UNDOCUMENTED`.
    """

    def register(candidate: type) -> type:
        library = LIBRARIES[candidate.__module__.rpartition(".")[2]]
        claimed = {**UNDOCUMENTED, **claims}
        _peers.append(
            Peer(
                name=name_of(candidate), library=library, contract=contract, candidate=candidate,
                claims={"dtypes": dtypes, **claimed},
            )
        )  # fmt: skip
        if right_in == ():
            return candidate
        only = str(claims.get("only", ""))
        return right(
            contract,
            fits=lambda case: fits(case) and (not only or holds(only, case.parameters)),
            dtypes=dtypes if right_in is None else right_in,
            oracle=oracle,
            **claimed,
        )(candidate)

    return register


@functools.cache
def installed() -> dict[str, str]:
    """Versions of the libraries that are installed, by module of this folder."""
    there = (name for name in LIBRARIES if importlib.util.find_spec(IMPORTS.get(name, name)))
    return {name: version(LIBRARIES[name]) for name in there}


@functools.cache
def peers() -> tuple[Peer, ...]:
    """Every peer whose library is installed."""
    for name in installed():
        importlib.import_module(f"gaugeblock.conformance.peers.{name}")
    return tuple(_peers)
