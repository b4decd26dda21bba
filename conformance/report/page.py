"""One self-contained HTML page: the overview, what fails, and for each contract its matrix and its errors against their limits.

Here is what the page shows and where each cell leads; how it looks is the business of the templates beside this file. All of it
is plain tables. What is known about a contract is written into a `noscript` element: a browser without JavaScript shows it, one
with it takes it for text, which costs nothing, until the contract is opened. So 60,000 verdicts open as fast as 600.
Every text goes through `printable` and is escaped by the template.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

import gaugeblock
from gaugeblock.conformance.engine.judging.verdict import FAILED, Statistics, Status, Verdict
from gaugeblock.conformance.report import overview, view
from gaugeblock.conformance.report.environment import describe
from gaugeblock.conformance.report.failure_text import Group, case_text, group
from gaugeblock.conformance.report.view import Block, Matrix

EXPLAINED = 200  # failures in full; the rest in a line each
LONG_NAME = 18  # of an output
REACH = 1.25  # of a track, in units of the limit


@dataclass(frozen=True)
class Plot:
    """Errors of one implementation under one property: the verdicts that have any, one for each dtype."""

    block: Block
    verdicts: list[Verdict]


@dataclass(frozen=True)
class Chapter:
    """All about one contract: its matrix, its errors by property, its verdicts, and why some are neither pass nor failure."""

    number: int
    matrix: Matrix
    status: Status
    plots: dict[str, list[Plot]]
    judged: list[Verdict]
    notes: list[Group]

    def column(self, block: Block) -> str:
        """The anchor of an implementation's columns in the matrix."""
        return f"b{self.number}-{self.matrix.blocks.index(block)}"

    def note(self, number: int) -> str:
        """The anchor of a note."""
        return f"n{self.number}-{number}"

    def has_long_names(self, prop: str) -> bool:
        """Whether the outputs of a plot need much room."""
        names = (name for plot in self.plots[prop] for verdict in plot.verdicts for name in verdict.statistics)
        return any(len(short_output(name)) > LONG_NAME for name in names)


def templates() -> jinja2.Environment:
    """The pages of `templates/`."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=lambda value: view.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["case_text"] = case_text
    found.filters["short_output"] = short_output
    found.filters["place"] = place
    found.filters["breakable"] = breakable
    return found


def render(verdicts: Sequence[Verdict], environment: dict[str, Any], profile: str) -> str:
    """The page, as one string without any reference to other files."""
    failures = group(each for each in verdicts if each.status in FAILED)
    matrices = view.matrices(verdicts)
    summary = overview.overview(matrices)
    chapters = [_chapter(number, row) for number, row in enumerate(summary.rows, 1)]
    judged = [each.identity for chapter in chapters for each in chapter.judged]
    numbers = {identity: number for number, identity in enumerate(judged, 1)}  # short names for anchors: there are many
    return (
        templates()
        .get_template("page.html.jinja")
        .render(
            version=gaugeblock.__version__,
            profile=profile,
            conclusion=view.conclusion(verdicts),
            counts=view.count(verdicts),
            cases=sum(each.cases for each in verdicts),
            seconds=sum(each.seconds for each in verdicts),
            kept=view.kept_of(view.tested(verdicts)),
            nowhere=view.nowhere(verdicts) if view.tested(verdicts) else [],
            failures=failures,
            explained=EXPLAINED,
            overview=summary,
            chapters={each.matrix.contract: each for each in chapters},
            few=len(chapters) <= overview.FEW,
            numbers=numbers,
            anchors=_anchors(chapters, numbers, failures),
            facts=describe(environment),
            view=view,
            status_class=lambda status: status.replace(" ", "-"),
        )
    )


_NOTED: tuple[Status, ...] = ("warning", "waived", "not supported")


def _anchors(chapters: Sequence[Chapter], numbers: Mapping[str, int], failures: Sequence[Group]) -> dict[str, str]:
    """Where each verdict's cell leads: its failure, its errors, its line in the table, or the reason why it was not judged."""
    anchors = {
        each.identity: f"{'e' if _is_plotted(each) else 'v'}{numbers[each.identity]}"
        for chapter in chapters
        for each in chapter.judged
    }
    for chapter in chapters:
        for number, note in enumerate(chapter.notes):
            anchors |= {each.identity: chapter.note(number) for each in note.verdicts if each.status == "not supported"}
    shown = enumerate(failures[:EXPLAINED], 1)
    return anchors | {each.identity: f"failure-{number}" for number, one in shown for each in one.verdicts}


def _is_plotted(verdict: Verdict) -> bool:
    return verdict.property in view.MEASURED and bool(verdict.statistics)


def _chapter(number: int, row: overview.Row) -> Chapter:
    matrix = row.matrix
    rows = [[matrix.cell(prop, block, dtype) for block in matrix.blocks for dtype in block.dtypes] for prop in matrix.properties]
    verdicts = [cell for cells in rows for cell in cells if cell is not None]
    plots = {prop: [_plot(matrix, prop, block) for block in matrix.blocks] for prop in view.MEASURED}
    plots = {prop: [each for each in found if each.verdicts] for prop, found in plots.items()}
    notes = [each for status in _NOTED for each in group(one for one in verdicts if one.status == status)]
    shown = {prop: found for prop, found in plots.items() if found}
    return Chapter(number, matrix, row.status, shown, view.tested(verdicts), notes)


def _plot(matrix: Matrix, prop: str, block: Block) -> Plot:
    cells = [matrix.cell(prop, block, dtype) for dtype in block.dtypes]
    return Plot(block, [each for each in cells if each is not None and each.statistics])


def place(statistics: Statistics) -> str:
    """Where the marks of an output stand on their track, as CSS: 0 is its left edge, 1 the right one, at 1.25 of the limit."""
    marks = {"m": statistics.max, "r": statistics.rms, "b": statistics.bias}
    places = {name: min(max(value, 0.0), REACH) / REACH for name, value in marks.items() if value is not None}
    return ";".join(f"--{name}:{value:.2g}" for name, value in places.items())


def short_output(name: str) -> str:
    """`∇ w13`."""
    return name.replace("gradient of ", "∇ ")


def breakable(name: str) -> Markup:
    """A long name that may be broken after its dots, dashes and underscores, and is one word to a search all the same."""
    return Markup(re.sub(r"(?<=[._-])(?=\w)", "<wbr>", str(escape(view.printable(name)))))
