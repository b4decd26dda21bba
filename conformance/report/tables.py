"""Tables in a terminal, a file or a log, whatever its width: a name in them is never cut off, nor broken.

`rich` squeezes a table that does not fit. Here it is told in parts: as many columns at a time as fit, each part with the rows'
names. What is wider still, a single name, is left to the terminal to wrap: in a file it is in one piece.
"""

import textwrap
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from gaugeblock.conformance.report.view import printable

GAP = 3  # between columns
INDENT = "  "
BETWEEN_ENTRIES = "  "
NARROWEST = 40  # of a paragraph beside a name; narrower, it stands below

Cell = str | Text
Line = list[Text]  # the cells of one line of the output


def print_line(console: Console, *parts: Cell) -> None:
    """A line that is left to the terminal to wrap; control characters become escapes."""
    console.print(Text.assemble(*map(_text, parts)), soft_wrap=True)


def print_columns(console: Console, header: Sequence[Cell], rows: Sequence[Sequence[Cell]], right: Sequence[int] = ()) -> None:
    """A table whose first column names its rows; where the columns do not fit, some at a time.

    Args:
        header: A title for each column.
        rows: A cell may have several lines.
        right: Columns of numbers, aligned to the right.
    """
    table = [[_text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    beside = widths[0] + GAP + max(widths[1:], default=0) <= console.width
    for number, part in enumerate(_parts(widths[1:], console.width - (widths[0] + GAP if beside else len(INDENT)))):
        if number:
            console.print()
        for row in table:
            cells = [row[1 + each] for each in part]
            aligned = [(widths[1 + each], 1 + each in right) for each in part]
            for line in _lines([row[0], *cells], [(widths[0], False), *aligned]) if beside else _below(row[0], cells, aligned):
                console.print(line, soft_wrap=True)


def _parts(widths: Sequence[int], available: int) -> list[list[int]]:
    """Neighbouring columns that fit together."""
    parts: list[list[int]] = [[]]
    used = 0
    for column, width in enumerate(widths):
        if parts[-1] and used + width > available:
            parts.append([])
            used = 0
        parts[-1].append(column)
        used += width + GAP
    return parts


def _lines(cells: Sequence[Text], aligned: Sequence[tuple[int, bool]]) -> Iterator[Text]:
    """The lines of one row."""
    columns = [cell.split("\n", allow_blank=True) for cell in cells]
    for number in range(max(map(len, columns))):
        line = Text()
        for column, (width, right) in zip(columns, aligned, strict=True):
            cell = column[number] if number < len(column) else Text()
            blank = " " * (width - cell_len(cell.plain))
            line.append_text(Text.assemble(blank, cell) if right else Text.assemble(cell, blank)).append(" " * GAP)
        line.rstrip()
        yield line


def _below(name: Text, cells: Sequence[Text], aligned: Sequence[tuple[int, bool]]) -> Iterator[Text]:
    """The row's name on a line of its own, its cells in the next."""
    if name.plain:
        yield name
    for line in _lines(cells, aligned):
        yield Text.assemble(INDENT, line)


def print_entries(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Names and what is said of them: columns where they fit in one part, else a paragraph to each name."""
    table = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    if len(INDENT) + sum(widths) + GAP * (len(widths) - 1) <= console.width:
        for row in table:
            padded = (cell + " " * (width + GAP - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
            console.print(Text(f"{INDENT}{''.join(padded)}".rstrip()), soft_wrap=True)
        return
    lead = len(INDENT) + widths[0] + GAP
    for name, *cells in table:
        told = " · ".join(filter(None, cells))
        if console.width - lead >= NARROWEST:
            print_paragraph(console, f"{INDENT}{name.ljust(widths[0])}{' ' * GAP}", told)
        else:
            console.print(Text(f"{INDENT}{name}"), soft_wrap=True)
            print_paragraph(console, 2 * INDENT, told)


def print_paragraph(console: Console, lead: str, text: str) -> None:
    """Text wrapped between words alone; its further lines are indented as far as `lead` reaches."""
    indent = " " * len(lead)
    width = max(console.width, len(lead) + 1)
    lines = textwrap.wrap(
        text, width, initial_indent=lead, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    for line in lines or [lead.rstrip()]:
        console.print(Text(line), soft_wrap=True)


def print_list(console: Console, lead: Text, entries: Sequence[Text], indent: int) -> None:
    """Entries after a lead, as many to a line as fit, none broken; further lines are indented."""
    line = lead.copy()
    for each in entries:
        if line.plain.strip() and cell_len(line.plain) + len(BETWEEN_ENTRIES) + _width(each) > console.width:
            console.print(line, soft_wrap=True)
            line = Text(" " * indent)
        line = Text.assemble(line, BETWEEN_ENTRIES if line.plain.strip() else "", each)
    console.print(line, soft_wrap=True)


def _text(cell: Cell) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text(printable(cell))


def _width(cell: Text) -> int:
    return max((cell_len(line) for line in cell.plain.split("\n")), default=0)
