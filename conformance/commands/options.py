"""Options that `gaugeblock check`, `gaugeblock selftest` and the pytest plugin share: told once, with or without a prefix."""

from collections.abc import Callable
from typing import Any

from gaugeblock.conformance.engine.vocabulary import DEVICES, DTYPES, PROFILES

Add = Callable[..., Any]  # `add_argument` of argparse, or `addoption` of pytest

FILTERS: dict[str, dict[str, Any]] = {
    "contract": {"metavar": "GLOB", "help": "only these contracts (repeatable)"},
    "implementation": {"metavar": "GLOB", "help": "only these implementations (repeatable)"},
    "dtype": {"choices": DTYPES, "help": "only this dtype (repeatable)"},
    "device": {"choices": DEVICES, "help": "only this device (repeatable)"},
}


def add_filters(add: Add, prefix: str = "--") -> None:
    """Options that keep some of the subjects."""
    for name, told in FILTERS.items():
        add(f"{prefix}{name}", action="append", default=[], **told)


def add_profile(add: Add, prefix: str = "--") -> None:
    """How long it may take."""
    add(f"{prefix}profile", default="quick", choices=PROFILES, help="how long it may take (default: quick)")
