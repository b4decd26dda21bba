"""What candidates register, told by a process of their own: none of their code runs in the judge's."""

from importlib.metadata import entry_points
from typing import Any

from gaugeblock.conformance.registry import ENTRY_POINTS, Implementation, RegistrationError, register_told
from gaugeblock.conformance.runner.handle import Lost, Process


def describe_candidates(sources: tuple[str, ...]) -> list[Implementation]:
    """What files and modules register, or, without any, installed packages.

    Raises:
        RegistrationError: If one cannot be read, run or imported, or registers nothing; one line says where and why.
    """
    if not sources and not entry_points(group=ENTRY_POINTS):
        return []
    process = Process("cpu", None)
    try:
        told = process.describe(sources)
    except Lost as lost:
        printed = process.printed().strip().splitlines()
        last = f": {printed[-1]}" if printed else ""
        raise RegistrationError(f"{', '.join(sources) or ENTRY_POINTS}: while it was imported, {lost.message}{last}") from None
    finally:
        process.stop()
    if "wrong" in told:
        raise RegistrationError(str(told["wrong"]))
    try:
        return [_row(each) for each in told["rows"]]
    except (KeyError, TypeError, AttributeError):
        raise RegistrationError(f"{', '.join(sources)}: what it registers cannot be read") from None


def _row(told: dict[str, Any]) -> Implementation:
    return register_told(str(told["contract"]), str(told["name"]), str(told["source"]), dict(told["claims"]))
