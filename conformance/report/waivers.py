"""A candidate's own list of known failures: TOML, each with a link and a date on which it ends.

[[waiver]]
id = "routers.softmax_topk/mychip/layout*/float16/*"    # glob over contract/implementation/property/dtype/device
link = "https://example.org/issues/12"
reason = "strided rows are copied by the runtime"         # optional
expires = 2026-12-31                                      # the last day on which it holds
"""

import datetime
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gaugeblock.conformance.engine.judging.verdict import FAILED, Verdict


@dataclass(frozen=True)
class Waiver:
    """One known failure; the fields are the keys of the file."""

    id: str
    link: str
    expires: datetime.date
    reason: str = ""

    def covers(self, verdict: Verdict) -> bool:
        """Whether the verdict is a failure that this waiver names."""
        return verdict.status in FAILED - {"error"} and fnmatchcase(verdict.identity, self.id)


@dataclass(frozen=True)
class Waivers:
    """The waivers of one file."""

    path: Path
    waivers: tuple[Waiver, ...]

    def apply(self, verdicts: Sequence[Verdict], today: datetime.date) -> tuple[list[Verdict], list[str]]:
        """Waives the failures that an unexpired waiver names.

        Returns:
            The verdicts, where failures under an expired waiver stay failures and say so; and a remark on each waiver
            that covers no failure, for it should be removed.
        """
        remarks = [
            f"{self.path}: waiver {each.id!r} {self._idle(each, verdicts)}: remove it"
            for each in self.waivers
            if not any(each.covers(verdict) for verdict in verdicts)
        ]
        return [self._judge(verdict, today) for verdict in verdicts], remarks

    def _judge(self, verdict: Verdict, today: datetime.date) -> Verdict:
        covering = [each for each in self.waivers if each.covers(verdict)]
        if not covering:
            return verdict
        latest = max(covering, key=lambda each: each.expires)
        if today <= latest.expires:
            return replace(verdict, status="waived", reason=f"{latest.link} (until {latest.expires})")
        return replace(verdict, reason=f"{verdict.reason}; its waiver expired on {latest.expires} ({latest.link})")

    @staticmethod
    def _idle(waiver: Waiver, verdicts: Sequence[Verdict]) -> str:
        matched = any(fnmatchcase(each.identity, waiver.id) for each in verdicts)
        return "matches only verdicts that do not fail" if matched else "matches no verdict of this run"


def load_waivers(path: Path) -> Waivers:
    """Reads a waivers file.

    Raises:
        ValueError: If it cannot be read or a key is missing, unknown or of the wrong type; one line names file and key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    rows = data.pop("waiver", [])
    if data:
        raise ValueError(f"{path}: unknown key {next(iter(data))!r}, expected tables [[waiver]]")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: 'waiver' must be tables [[waiver]]")
    return Waivers(path, tuple(_waiver(f"{path}: waiver {number}", row) for number, row in enumerate(rows, 1)))


def _waiver(place: str, row: dict[str, Any]) -> Waiver:
    for key in ("id", "link", "expires"):
        if key not in row:
            raise ValueError(f"{place}: {key!r} is missing")
    for key, value in row.items():
        if key not in ("id", "link", "expires", "reason"):
            raise ValueError(f"{place}: unknown key {key!r}, expected 'id', 'link', 'expires' and perhaps 'reason'")
        if key == "expires" and type(value) is not datetime.date:  # a datetime is a date too, to isinstance
            raise ValueError(f"{place}: 'expires' must be a date such as 2026-12-31, without quotes, got {value!r}")
        if key != "expires" and not isinstance(value, str):
            raise ValueError(f"{place}: {key!r} must be text, got {value!r}")
    if not row["link"].startswith(("https://", "http://")):
        raise ValueError(f"{place}: 'link' must be an address (https://...), got {row['link']!r}")
    return Waiver(**row)
