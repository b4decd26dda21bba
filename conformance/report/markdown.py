"""Verdicts for a CI service: a Markdown summary, GitHub's annotations, a badge."""

import re
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from gaugeblock.conformance.engine.judging.verdict import FAILED, Status, Verdict
from gaugeblock.conformance.report import view
from gaugeblock.conformance.report.environment import describe
from gaugeblock.conformance.report.failure_text import Group, explanation, group
from gaugeblock.conformance.report.view import Block, Matrix, printable

EMOJI: dict[Status, str] = {
    "pass": "✅", "warning": "⚠️", "fail": "❌", "not supported": "➖", "waived": "🏳️", "crash": "💥", "timeout": "⏱️",
    "error": "🛑",
}  # fmt: skip
EXPLAINED = 30  # failures in full: GitHub refuses a summary of more than 1 MiB
ANNOTATIONS = 10  # GitHub shows no more errors of one step


def summary(verdicts: Sequence[Verdict], environment: dict[str, Any], profile: str) -> str:
    """The run as GitHub Markdown: a table for each contract, what fails, and where it ran."""
    conclusion = view.conclusion(verdicts)
    counts = [[f"{EMOJI[status]} {status}", number] for status, number in view.count(verdicts).items()]
    failures = group(each for each in verdicts if each.status in FAILED)
    parts = [
        f"## gaugeblock: {conclusion}",
        _table(counts, ["status", f"verdicts (profile {inline(profile)})"]),
        *(f"### {inline(matrix.contract)}\n\n{_matrix(matrix)}" for matrix in view.matrices(verdicts)),
        *(_failure(each) for each in failures[:EXPLAINED]),
        *([f"... and {len(failures) - EXPLAINED} more failures, in the report."] if len(failures) > EXPLAINED else []),
        *([_visited(verdicts)] if any(each.coverage for each in verdicts) else []),
        _table([[label, inline(text)] for label, text in describe(environment).items()], ["run", ""]),
    ]
    return "\n\n".join(parts) + "\n"


def inline(text: str) -> str:
    """The text with every sign that Markdown or HTML could take for its own as an entity, in one line."""
    return re.sub(r"[^\w\s./:,+-]", lambda sign: f"&#{ord(sign[0])};", " ".join(printable(text).split()))


def _table(rows: list[list[Any]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _matrix(matrix: Matrix) -> str:
    rows = [[prop, *(_cell(matrix, prop, block) for block in matrix.blocks)] for prop in matrix.properties]
    return _table(
        [[inline(str(each)) for each in row] for row in rows],
        ["", *(inline(each.title) for each in matrix.blocks)],
    )


def _cell(matrix: Matrix, prop: str, block: Block) -> str:
    """One mark for all dtypes where they agree, and the worst error of them; else one for each."""
    cells = {dtype: cell for dtype in block.dtypes if (cell := matrix.cell(prop, block, dtype)) is not None}
    errors = [error for each in cells.values() if (error := view.worst_error(each)) is not None]
    statuses = list(dict.fromkeys(each.status for each in cells.values()))
    if len(statuses) == 1:
        return EMOJI[statuses[0]] + (f" {view.units(max(errors))}" if errors else "")
    return " ".join(f"{EMOJI[each.status]} {view.short_dtype(dtype)}" for dtype, each in cells.items())


def _failure(failures: Group) -> str:
    first = failures.first
    title = f"{EMOJI[first.status]} <b>{inline(f'{first.contract} {first.implementation}')}</b>: {inline(failures.places)}"
    body = [_fenced("\n".join(explanation(first)), "text")]
    if first.failure and first.failure.script:
        body.append(_fenced(printable(first.failure.script), "python"))
    return "\n\n".join([f"<details><summary>{title}<br>{inline(first.reason)}</summary>", *body, "</details>"])


def _visited(verdicts: Sequence[Verdict]) -> str:
    """What each property has visited of each contract, of the implementation of which it visited least."""
    rows = [
        [inline(each.contract), inline(each.property), inline(view.visited(each)), inline(each.implementation)]
        for each in view.least_visited(verdicts)
    ]
    table = _table(rows, ["contract", "property", "visited", "least of all in"])
    return f"<details><summary>what was visited</summary>\n\n{inline(view.SPARING)}\n\n{table}\n\n</details>"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def annotations(verdicts: Sequence[Verdict]) -> list[str]:
    """GitHub's workflow commands that show the first failures beside the code."""

    def escaped(text: str) -> str:
        return printable(text).replace("%", "%25").replace("\n", "%0A")

    def escaped_property(text: str) -> str:
        return escaped(text).replace(":", "%3A").replace(",", "%2C")

    failures = group(each for each in verdicts if each.status in FAILED)[:ANNOTATIONS]
    return [
        f"::error title={escaped_property(f'{each.first.contract} {each.first.implementation}')}::"
        + escaped(f"{each.places}: {each.first.reason}")
        for each in failures
    ]


def badge(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """A shields.io endpoint: `conformance | strict 412/412`, where the word is the loosest rounding met."""
    judged = view.tested(verdicts)
    met = {each.rounding for each in judged if each.rounding}
    conforming = sum(each.status in ("pass", "warning") for each in judged)
    words = ["eager" if "eager" in met else "strict"] if met else []
    message = " ".join([*words, f"{conforming}/{len(judged)}"]) if judged else "nothing tested"
    failing = any(each.status in FAILED for each in judged)
    color = "lightgrey" if not judged else "red" if failing else "brightgreen" if conforming == len(judged) else "yellow"
    return {"schemaVersion": 1, "label": "conformance", "message": message, "color": color}
