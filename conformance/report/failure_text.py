"""Failures in words: what a failing verdict says, and many that say the same told once."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gaugeblock.conformance.engine.judging.verdict import Verdict
from gaugeblock.conformance.report.view import printable, short_dtype

SHOWN_CASES = 3  # a pooled failure has dozens; its script holds them all
VERBS = {"crash": "crashes in", "timeout": "gives no answer in", "error": "could not be judged in"}
SHOWN_OUTPUT, SHOWN_WIDTH = 10, 200  # lines of what a candidate printed, and characters of each
NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?(?:e[+-]?\d+)?%?")


def case_text(case: dict[str, Any]) -> str:
    """The case as Python writes it; as `repr(Case(**case))`, without importing torch."""
    return f"Case({', '.join(f'{name}={value!r}' for name, value in case.items())})"


def explanation(verdict: Verdict) -> list[str]:
    """What failed and by how much, the pattern, further lines, and the shrunk cases."""
    failure = verdict.failure
    if failure is None:
        return [printable(verdict.reason)]
    cases = [case_text(case) for case in failure.cases[:SHOWN_CASES]]
    hidden = len(failure.cases) - len(cases)
    more = [f"... and {hidden} more cases, in the script"] if hidden else []
    printed = failure.output.strip().splitlines()
    shown = [each if len(each) <= SHOWN_WIDTH else f"{each[:SHOWN_WIDTH]}..." for each in printed[:SHOWN_OUTPUT]]
    output = ["it printed:", *shown, *(["..."] if len(printed) > SHOWN_OUTPUT else [])] if printed else []
    lines = [verdict.reason or failure.message, failure.diagnosis, *failure.details, *output, *cases, *more]
    return [printable(line) for line in lines if line]


def failure_lines(verdict: Verdict) -> list[str]:
    """Everything about a failing verdict, as pytest shows it: the explanation, then the script."""
    place = f"{verdict.property} in {verdict.dtype} on {verdict.device}"
    title = f"{verdict.contract}: {verdict.implementation} {VERBS.get(verdict.status, 'fails')} {place}"
    script = verdict.failure.script if verdict.failure else ""
    return [
        printable(title),
        *explanation(verdict),
        *(["", *printable(script).splitlines()] if script else []),
    ]


@dataclass(frozen=True)
class Group:
    """Verdicts on one implementation with the same reason, apart from the numbers in it; the first speaks for all."""

    verdicts: tuple[Verdict, ...]

    @property
    def first(self) -> Verdict:
        """The one whose case is shown."""
        return self.verdicts[0]

    @property
    def places(self) -> str:
        """The cells: `parity, layout in fp32, fp16; empty in fp32`."""
        columns: dict[str, dict[str, None]] = {}
        for each in self.verdicts:
            column = short_dtype(each.dtype) + (f" on {each.device}" if each.device != "cpu" else "")
            columns.setdefault(each.property, {})[column] = None
        rows: dict[str, list[str]] = {}
        for prop, found in columns.items():
            rows.setdefault(", ".join(found), []).append(prop)
        return "; ".join(f"{', '.join(properties)} in {dtypes}" for dtypes, properties in rows.items())


def group(verdicts: Iterable[Verdict]) -> list[Group]:
    """Groups verdicts by contract, implementation, status and reason, in order of first appearance."""
    found: dict[tuple[str, ...], list[Verdict]] = {}
    for each in verdicts:
        reason = NUMBER.sub("#", each.reason)
        found.setdefault((each.contract, each.implementation, each.status, reason), []).append(each)
    return [Group(tuple(each)) for each in found.values()]
