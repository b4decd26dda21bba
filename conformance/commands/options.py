"""Options that `gaugeblock check`, `gaugeblock selftest` and the pytest plugin share: told once, with or without a prefix."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from gaugeblock.conformance.engine.devices import unknown_device
from gaugeblock.conformance.engine.vocabulary import DEVICES, DTYPES, PROFILES

Add = Callable[..., Any]  # `add_argument` of argparse, or `addoption` of pytest


def device(name: str) -> str:
    """The name of a device type.

    Raises:
        ArgumentTypeError: Torch knows none of that name.
    """
    if why := "" if name in DEVICES else unknown_device(name):
        raise ArgumentTypeError(why)
    return name


FILTERS: dict[str, dict[str, Any]] = {
    "contract": {"metavar": "GLOB", "help": "only these contracts (repeatable)"},
    "implementation": {"metavar": "GLOB", "help": "only these implementations (repeatable)"},
    "dtype": {"choices": DTYPES, "help": "only this dtype (repeatable)"},
    "device": {"metavar": "TYPE", "type": device, "help": "only this device, one of torch's types, as cpu or cuda (repeatable)"},
}


def add_filters(add: Add, prefix: str = "--") -> None:
    """Options that keep some of the subjects."""
    for name, told in FILTERS.items():
        add(f"{prefix}{name}", action="append", default=[], **told)


def add_profile(add: Add, prefix: str = "--") -> None:
    """How long it may take."""
    add(f"{prefix}profile", default="quick", choices=PROFILES, help="how long it may take (default: quick)")
