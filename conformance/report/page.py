"""One self-contained HTML page: the matrix as a coloured grid, errors against their limits, failures, and where it ran.

Here is what the pictures show and where; how they look is the business of `page.html.jinja`. Every text goes through
`printable` and is escaped by the template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import gaugeblock
from gaugeblock.conformance.engine.judging.verdict import FAILED, Statistics, Status, Verdict
from gaugeblock.conformance.report import view
from gaugeblock.conformance.report.environment import describe
from gaugeblock.conformance.report.failure_text import Group, case_text, group
from gaugeblock.conformance.report.view import Block, Matrix

LETTER = 7.0  # width of a letter of the grids, in their pixels
CELL_WIDTH, CELL_HEIGHT, GAP, BLOCK_GAP, HEAD = 52, 24, 3, 16, 46
TRACK, TRACK_UNITS, ROW_HEIGHT, DOT_LABEL, DOT_NUMBER = (
    168,
    1.25,
    19,
    160,
    44,
)  # a dot plot reaches 1.25 of the limit


@dataclass(frozen=True)
class Cell:
    """A verdict in the grid, and the anchor of what is known about it."""

    x: float
    y: float
    verdict: Verdict
    href: str


@dataclass(frozen=True)
class Label:
    """A text in a picture; `width` is that of the bracket beneath it, if it has one."""

    x: float
    y: float
    text: str
    width: float = 0


@dataclass(frozen=True)
class Grid:
    """The matrix of one contract as a picture."""

    width: float
    height: float
    cells: list[Cell]
    rows: list[Label]
    heads: list[Label]
    dtypes: list[Label]


@dataclass(frozen=True)
class Dots:
    """The three statistics of one output; positions on a track where the limit is at 1."""

    y: float
    name: str
    statistics: Statistics
    max: float
    rms: float | None
    bias: float | None


@dataclass(frozen=True)
class Strip:
    """The outputs of one verdict in a dot plot."""

    y: float
    height: float
    verdict: Verdict
    dots: list[Dots]


@dataclass(frozen=True)
class Plot:
    """Errors of one implementation under one property, one strip for each dtype."""

    prop: str
    block: Block
    height: float
    strips: list[Strip]


@dataclass(frozen=True)
class Chapter:
    """All about one contract."""

    matrix: Matrix
    grid: Grid
    plots: dict[str, list[Plot]]
    verdicts: list[Verdict]


def templates() -> jinja2.Environment:
    """The pages beside this file."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: view.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["case_text"] = case_text
    return found


def render(verdicts: Sequence[Verdict], environment: dict[str, Any], profile: str) -> str:
    """The page, as one string without any reference to other files."""
    failures = group(each for each in verdicts if each.status in FAILED)
    matrices = view.matrices(verdicts)
    anchors = _anchors(verdicts, failures)
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            version=gaugeblock.__version__,
            profile=profile,
            conclusion=view.conclusion(verdicts),
            outcome="none" if not view.tested(verdicts) else "fail" if failures else "pass",
            counts=view.count(verdicts),
            total=len(verdicts),
            cases=sum(each.cases for each in verdicts),
            seconds=sum(each.seconds for each in verdicts),
            failures=failures,
            notes=[note for status in _NOTED for note in group(each for each in verdicts if each.status == status)],
            chapters=[_chapter(matrix, anchors) for matrix in matrices],
            environment=environment,
            facts=describe(environment),
            view=view,
            status_class=lambda status: status.replace(" ", "-"),
            cell_size=(CELL_WIDTH, CELL_HEIGHT),
            plot=(DOT_LABEL, TRACK, DOT_NUMBER, TRACK / TRACK_UNITS),
        )
    )


_NOTED: tuple[Status, ...] = ("warning", "waived", "not supported")


def _anchors(verdicts: Sequence[Verdict], failures: Sequence[Group]) -> dict[str, str]:
    """Where each verdict's cell leads: its failure, its errors, or its line in the table."""
    anchors = {each.identity: f"row-{view.slug(each)}" for each in verdicts}
    anchors |= {each.identity: view.slug(each) for each in verdicts if _is_plotted(each)}
    return anchors | {each.identity: f"failure-{number}" for number, one in enumerate(failures, 1) for each in one.verdicts}


def _is_plotted(verdict: Verdict) -> bool:
    return verdict.property in view.MEASURED and bool(verdict.statistics)


def _chapter(matrix: Matrix, anchors: dict[str, str]) -> Chapter:
    plots = {prop: [_plot(matrix, prop, block) for block in matrix.blocks] for prop in view.MEASURED}
    plots = {prop: [each for each in found if each.strips] for prop, found in plots.items()}
    verdicts = [
        cell
        for prop in matrix.properties
        for block in matrix.blocks
        for dtype in block.dtypes
        if (cell := matrix.cell(prop, block, dtype)) is not None
    ]
    return Chapter(matrix, _grid(matrix, anchors), {prop: found for prop, found in plots.items() if found}, verdicts)


def _grid(matrix: Matrix, anchors: dict[str, str]) -> Grid:
    left = max(map(len, matrix.properties)) * LETTER + 14
    tops = {prop: HEAD + row * (CELL_HEIGHT + GAP) for row, prop in enumerate(matrix.properties)}
    cells, heads, dtypes = [], [], []
    x = left
    for block in matrix.blocks:
        columns = len(block.dtypes) * (CELL_WIDTH + GAP) - GAP
        width = max(columns, len(block.title) * LETTER)
        heads.append(Label(x, 14, block.title, columns))
        for column, dtype in enumerate(block.dtypes):
            at = x + column * (CELL_WIDTH + GAP)
            dtypes.append(Label(at + CELL_WIDTH / 2, HEAD - 10, view.short_dtype(dtype)))
            found = {prop: matrix.cell(prop, block, dtype) for prop in matrix.properties}
            cells += [Cell(at, tops[prop], each, anchors[each.identity]) for prop, each in found.items() if each]
        x += width + BLOCK_GAP
    rows = [Label(left - 10, top + CELL_HEIGHT / 2 + 4, prop) for prop, top in tops.items()]
    return Grid(x - BLOCK_GAP + 2, HEAD + len(tops) * (CELL_HEIGHT + GAP), cells, rows, heads, dtypes)


def _plot(matrix: Matrix, prop: str, block: Block) -> Plot:
    strips: list[Strip] = []
    y = 6.0
    for dtype in block.dtypes:
        verdict = matrix.cell(prop, block, dtype)
        if verdict is None or not verdict.statistics:
            continue
        dots = [
            _dots((row + 0.5) * ROW_HEIGHT, name, statistics) for row, (name, statistics) in enumerate(verdict.statistics.items())
        ]
        strips.append(Strip(y, len(dots) * ROW_HEIGHT, verdict, dots))
        y += len(dots) * ROW_HEIGHT + 6
    return Plot(prop, block, y + 18, strips)


def _dots(y: float, name: str, statistics: Statistics) -> Dots:
    def place(value: float | None) -> float | None:
        return None if value is None else DOT_LABEL + min(max(value, 0.0), TRACK_UNITS) * TRACK / TRACK_UNITS

    short = name.replace("gradient of ", "∇ ")
    return Dots(
        y,
        short,
        statistics,
        place(statistics.max) or DOT_LABEL,
        place(statistics.rms),
        place(statistics.bias),
    )
