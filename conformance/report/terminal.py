"""Verdicts in the terminal: progress while they arrive, then the matrix, the failures, and a closing line."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from gaugeblock.conformance.engine.judging.verdict import FAILED, Status, Verdict
from gaugeblock.conformance.report import view
from gaugeblock.conformance.report.failure_text import Group, explanation, group
from gaugeblock.conformance.report.overview import FEW, Tile, overview, worth_showing
from gaugeblock.conformance.report.tables import print_line, print_list
from gaugeblock.conformance.report.view import Block, Matrix, printable

STYLES: dict[Status, str] = {
    "pass": "green",
    "warning": "yellow",
    "fail": "bold red",
    "not supported": "dim",
    "waived": "cyan",
    "crash": "bold magenta",
    "timeout": "bold magenta",
    "error": "bold red",
}
EXPLAINED = 12  # failures shown in full; the rest in a line each
ROOM_BESIDE_NAMES = 60  # in the overview; where there is less, what does not fit stands below them
LISTED = 40  # lines of each kind, unless all are asked for
BETWEEN_BLOCKS = "  "


def print_matrix(
    verdicts: Sequence[Verdict],
    console: Console,
    seconds: float | None = None,
    folder: Path | None = None,
    *,
    verbose: bool = False,
) -> None:
    """Prints what came of a run: an overview of many contracts, matrices, what fails and why, and a closing line.

    A few contracts are what someone works at: their matrices are printed whole. Of many, each gets a line, and a matrix only
    where there is anything but passes; the page has them all.

    Args:
        verdicts: In the order in which contracts and properties should appear.
        seconds: How long the run took; otherwise what the verdicts took together.
        folder: Where the report is written: a failure then names its script there instead of printing it.
        verbose: Whether to print every matrix, and every line.
    """
    matrices = view.matrices(verdicts)
    if len(matrices) > FEW:
        _print_overview(matrices, console)
    shown = matrices if verbose else worth_showing(matrices)
    for matrix in shown:
        _print_contract(matrix, console)
    _print_rest(len(shown), len(matrices), "matrices", console)
    if verdicts:
        console.print(_legend(verdicts))
    most = None if verbose else LISTED
    failures = group(each for each in verdicts if each.status in FAILED)
    for number, each in enumerate(failures[:most]):
        _print_failure(each, console, folder, in_full=number < EXPLAINED)
    _print_rest(len(failures[:most]), len(failures), "failures", console)
    for status in ("warning", "waived", "not supported"):
        _print_notes(status, verdicts, console, most)
    _print_quietly(verdicts, console)
    console.print()
    print_line(console, _closing_line(verdicts, sum(each.seconds for each in verdicts) if seconds is None else seconds))


# --------------------------------------------------------------------------------------------------------- the overview


def _print_overview(matrices: Sequence[Matrix], console: Console) -> None:
    """A line for each contract: its mark, and the worst of each implementation."""
    console.print()
    lead = max(cell_len(printable(each.contract)) for each in matrices) + 2
    beside = console.width - lead >= ROOM_BESIDE_NAMES
    for rows in overview(matrices).families.values():
        for row in rows:
            name = _ljust(printable(row.matrix.contract), lead - 2 if beside else 0)
            mark = Text.assemble((f"{view.MARKS[row.status]} ", STYLES[row.status]), (name, "bold"))
            print_list(console, mark, [_entry(each) for each in row.tiles if each], lead + 2 if beside else 4)


def _entry(tile: Tile) -> Text:
    """`triton .31`, or `mychip ✗ 2e7`."""
    text = tile.text(narrow=True).removeprefix(f"{view.MARKS['pass']} ").replace(view.MARKS["pass"], "")
    return Text.assemble(printable(tile.block.title), (f" {text}".rstrip(), STYLES[tile.status]))


def _print_contract(matrix: Matrix, console: Console) -> None:
    label_width = max(map(len, matrix.properties))
    cell_width = max(4, *(len(view.cell_text(each, narrow=True)) for each in matrix.cells.values()))
    tables = list(_tables(matrix.blocks, console.width - label_width, cell_width))
    for number, blocks in enumerate(tables, 1):
        console.print()
        part = f"  {number} of {len(tables)}" if len(tables) > 1 else ""
        console.print(Text.assemble((printable(matrix.contract), "bold"), (part, "dim")))
        for line in _table(matrix, blocks, label_width, cell_width, console.width):
            line.rstrip()
            console.print(line, soft_wrap=True)


def _tables(blocks: Sequence[Block], width: int, cell_width: int) -> Iterator[list[Block]]:
    """As many neighbouring blocks as fit; an implementation is never torn apart."""
    table: list[Block] = []
    used = 0
    for block in blocks:
        needed = len(BETWEEN_BLOCKS) + _block_width(block, cell_width)
        if table and used + needed > width:
            yield table
            table, used = [], 0
        table.append(block)
        used += needed
    yield table


def _block_width(block: Block, cell_width: int) -> int:
    return max(len(block.dtypes) * (cell_width + 1) - 1, cell_len(printable(block.title)))


def _table(matrix: Matrix, blocks: list[Block], label_width: int, cell_width: int, width: int) -> Iterator[Text]:
    widths = [_block_width(block, cell_width) for block in blocks]
    titles, dtypes = Text(" " * label_width), Text(" " * label_width)
    for block, needed in zip(blocks, widths, strict=True):
        titles.append(BETWEEN_BLOCKS + _ljust(printable(block.title), needed), "bold")
        dtypes.append(BETWEEN_BLOCKS + _row(map(view.short_dtype, block.dtypes), cell_width).ljust(needed), "dim")
    if cell_len(titles.plain) > width:  # one name that is too long to stand above its columns
        titles = Text(titles.plain.strip().rjust(width), "bold")
    yield titles
    yield dtypes
    for prop in matrix.properties:
        line = Text(prop.ljust(label_width))
        for block, needed in zip(blocks, widths, strict=True):
            cells = [matrix.cell(prop, block, dtype) for dtype in block.dtypes]
            texts = Text(" ").join(
                Text(view.cell_text(cell, narrow=True).ljust(cell_width), STYLES[cell.status] if cell else "") for cell in cells
            )
            texts.pad_right(needed - len(texts))
            line.append(BETWEEN_BLOCKS).append_text(texts)
        yield line


def _row(texts: Iterable[str], width: int) -> str:
    return " ".join(each.ljust(width) for each in texts)


def _ljust(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _legend(verdicts: Sequence[Verdict]) -> Text:
    legend = Text("\n")
    for status in view.count(verdicts):
        legend.append(view.MARKS[status], STYLES[status]).append(f" {status}   ", "dim")
    if any(view.worst_error(each) is not None for each in verdicts):
        legend.append("\nA number is the worst error over its limit.", "dim")
    return legend


# Below, lines are left to the terminal to wrap: what is copied or searched for in a log stays in one piece.


def _print_failure(failures: Group, console: Console, folder: Path | None, *, in_full: bool) -> None:
    first = failures.first
    lines = explanation(first)
    console.print()
    mark = Text(f"{view.MARKS[first.status]} ", STYLES[first.status])
    print_line(console, mark, Text(printable(f"{first.contract} {first.implementation}"), "bold"), f": {failures.places}")
    for number, line in enumerate(lines if in_full else lines[:1]):
        console.print(Text(f"  {line}", STYLES[first.status] if number == 0 else ""), soft_wrap=True)
    script = first.failure.script if first.failure else ""
    if not script or not in_full:
        return
    if folder is not None:
        console.print(Text(f"  python {folder / 'failures' / view.slug(first)}.py", "dim"), soft_wrap=True)
    else:
        console.print(Text(f"\n{printable(script)}", "dim"), soft_wrap=True)


def _print_notes(status: Status, verdicts: Sequence[Verdict], console: Console, most: int | None) -> None:
    """Why cells are neither a pass nor a failure: one line for each reason; mere counts for what is not supported."""
    found = [each for each in verdicts if each.status == status]
    if found:
        console.print()
    if status == "not supported":
        reasons = collections.Counter(each.reason for each in found)
        for reason, times in reasons.most_common(most):
            print_line(console, Text(printable(f"– {times} not supported: {reason}"), "dim"))
        _print_rest(len(reasons.most_common(most)), len(reasons), "reasons", console)
        return
    groups = group(found)
    for notes in groups[:most]:
        first = notes.first
        text = f"{first.contract} {first.implementation}, {notes.places}: {first.reason}"
        print_line(console, Text(f"{view.MARKS[status]} ", STYLES[status]), text)
    _print_rest(len(groups[:most]), len(groups), "of these", console)


def _print_rest(shown: int, number: int, what: str, console: Console) -> None:
    if number > shown:
        print_line(console, Text(f"... and {number - shown} more {what}: --verbose prints all", "dim"))


def _print_quietly(verdicts: Sequence[Verdict], console: Console) -> None:
    """What applied to nothing, and what was not judged again."""
    nowhere, kept = view.nowhere(verdicts), view.kept_of(view.tested(verdicts))
    if nowhere and view.tested(verdicts):
        console.print()
        print_line(console, Text(printable(f"applied to nothing here: {', '.join(nowhere)}"), "dim"))
    if kept:
        console.print()
        print_line(console, Text(f"{view.KEPT} not judged again: {kept}", "dim"))


def _closing_line(verdicts: Sequence[Verdict], seconds: float) -> Text:
    counts = view.count(verdicts)
    conclusion = view.conclusion(verdicts)
    style = "bold red" if FAILED & counts.keys() or not view.tested(verdicts) else "bold green"
    line = Text.assemble((conclusion[0].upper() + conclusion[1:], style), ": ")
    for status, number in counts.items():
        line.append(f"{number} {status}", STYLES[status]).append(", ")
    cases = sum(each.cases for each in verdicts if not each.kept)
    return line.append(f"{cases:,} {'case' if cases == 1 else 'cases'} judged in {view.duration(seconds)}")


class Counter:
    """Counts verdicts as they arrive, for the bar of a terminal or the lines of a log."""

    def __init__(self, total: int, console: Console, bar: Progress | None) -> None:
        self.total, self.console, self.bar = total, console, bar
        self.done = self.failed = self.tenths = 0
        self.start = monotonic()
        self.task = bar.add_task("", total=total, failed="") if bar else None

    def advance(self, verdict: Verdict) -> None:
        """Takes one more verdict into account."""
        self.done += 1
        self.failed += verdict.status in FAILED
        if self.bar is not None and self.task is not None:
            subject = printable(f"{verdict.contract} {verdict.implementation}")
            failed = f"{self.failed} failing" if self.failed else ""
            self.bar.update(self.task, advance=1, description=subject, failed=failed)
        elif self.total and self.done * 10 // self.total > self.tenths:
            self.tenths = self.done * 10 // self.total
            counts = f"{self.done} of {self.total} verdicts, {self.failed} failing"
            self.console.print(f"{self.tenths * 10:3d} %  {counts}, {view.duration(monotonic() - self.start)}")


@contextmanager
def progress(total: int, console: Console) -> Iterator[Counter]:
    """Shows how many verdicts have come: a bar in a terminal, elsewhere a line for each tenth, so that logs stay short."""
    if not console.is_terminal:
        yield Counter(total, console, None)
        return
    columns = (
        BarColumn(30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]}", style="bold red", markup=False),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Counter(total, console, bar)
