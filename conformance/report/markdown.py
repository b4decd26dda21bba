"""Verdicts for a CI service: a Markdown summary, GitHub's annotations, a badge."""

import re
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from gaugeblock.conformance.engine.judging.verdict import FAILED, Status, Verdict
from gaugeblock.conformance.report import view
from gaugeblock.conformance.report.environment import describe
from gaugeblock.conformance.report.failure_text import Group, explanation, group
from gaugeblock.conformance.report.overview import FEW, Column, Tile, overview, worth_showing
from gaugeblock.conformance.report.view import Block, Matrix, printable

EMOJI: dict[Status, str] = {
    "pass": "✅", "warning": "⚠️", "fail": "❌", "not supported": "➖", "waived": "🏳️", "crash": "💥", "timeout": "⏱️",
    "error": "🛑",
}  # fmt: skip
LIMIT = 2**20 - 2**16  # bytes: GitHub shows nothing of a step's summary above 1 MiB, to which others may add
EXPLAINED = 30  # failures in full
LISTED = 200  # of the others, in a line each
ANNOTATIONS = 10  # GitHub shows no more errors of one step


def summary(verdicts: Sequence[Verdict], environment: dict[str, Any], profile: str, limit: int = LIMIT) -> str:
    """The run as GitHub Markdown: an overview, what fails, matrices, what was visited, and where it ran.

    Matrices are those of a few contracts, or of many those in which anything but a pass is. What comes last is left out first
    where all together is longer than `limit` bytes.
    """
    conclusion = view.conclusion(verdicts)
    counts = [[f"{EMOJI[status]} {status}", number] for status, number in view.count(verdicts).items()]
    failures = group(each for each in verdicts if each.status in FAILED)
    matrices = view.matrices(verdicts)
    shown = worth_showing(matrices)
    first = [
        f"## gaugeblock: {conclusion}",
        _table(counts, ["status", f"verdicts (profile {inline(profile)})"]),
        *([_overview(matrices)] if len(matrices) > FEW else []),
        *_quietly(verdicts),
    ]
    run = _table([[label, inline(text)] for label, text in describe(environment).items()], ["run", ""])
    details = [
        *map(_failure, failures[:EXPLAINED]),
        *([_more(failures[EXPLAINED:])] if len(failures) > EXPLAINED else []),
        *(f"### {inline(each.contract)}\n\n{_matrix(each)}" for each in shown),
        *([_visited(verdicts)] if any(each.coverage for each in verdicts) else []),
    ]
    room = limit - sum(_size(each) for each in (*first, run))
    return "\n\n".join([*first, *_fitting(details, room), run]) + "\n"


LEFT_OUT = "... and more, which has no room here: see the report."


def _fitting(parts: Sequence[str], room: int) -> list[str]:
    """Those that fit, in their order, and a word on the rest."""
    room -= _size(LEFT_OUT)
    fitting = []
    for each in parts:
        if _size(each) <= room:
            fitting.append(each)
            room -= _size(each)
    return fitting if len(fitting) == len(parts) else [*fitting, LEFT_OUT]


def _size(part: str) -> int:
    return len(part.encode("utf-8", errors="replace")) + len("\n\n")


def _overview(matrices: Sequence[Matrix]) -> str:
    """Contracts × implementations: the worst status and error of each, with its name where a column has several."""
    found = overview(matrices)
    several = len(found.devices) > 1

    def head(column: Column) -> str:
        return inline(f"{column.title or column.kind}{f' {column.device}' if several else ''}")

    def cell(tile: Tile | None, column: Column) -> str:
        if tile is None:
            return ""
        text = tile.text().replace(view.MARKS[tile.status], EMOJI[tile.status], 1)
        return text if column.title else f"{text} {inline(tile.block.implementation)}"

    rows = [
        [inline(row.matrix.contract), *(cell(tile, column) for tile, column in zip(row.tiles, found.columns, strict=True))]
        for row in found.rows
    ]
    return _table(rows, ["", *map(head, found.columns)])


def _quietly(verdicts: Sequence[Verdict]) -> list[str]:
    """What was not judged again, and what applied to nothing."""
    judged = view.tested(verdicts)
    nowhere, kept = view.nowhere(verdicts) if judged else [], view.kept_of(judged)
    return [
        *([f"verdicts: {inline(kept)}"] if kept else []),
        *([f"<sub>applied to nothing here: {inline(', '.join(nowhere))}</sub>"] if nowhere else []),
    ]


def _more(failures: Sequence[Group]) -> str:
    """A line for each."""
    lines = [
        f"- {EMOJI[each.first.status]} {inline(f'{each.first.contract} {each.first.implementation}, {each.places}')}: "
        f"{inline(each.first.reason)}"
        for each in failures[:LISTED]
    ]
    rest = [f"- ... and {len(failures) - LISTED} more, in the report"] if len(failures) > LISTED else []
    return f"<details><summary>{len(failures)} more failures</summary>\n\n{chr(10).join([*lines, *rest])}\n\n</details>"


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
        kept = view.KEPT if all(each.kept for each in cells.values()) else ""
        return EMOJI[statuses[0]] + kept + (f" {view.units(max(errors))}" if errors else "")
    marks = {dtype: EMOJI[each.status] + (view.KEPT if each.kept else "") for dtype, each in cells.items()}
    return " ".join(f"{mark} {view.short_dtype(dtype)}" for dtype, mark in marks.items())


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
