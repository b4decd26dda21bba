"""Contracts × implementations, one cell each: what a run over a hundred operations is read by first."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from gaugeblock.conformance.engine.judging.verdict import FAILED, Status, Verdict
from gaugeblock.conformance.report import view
from gaugeblock.conformance.report.view import Block, Matrix

FEW = 3  # contracts of which every matrix is shown at once
QUIET: frozenset[Status] = frozenset({"pass", "not supported"})
NAMED = 4  # failing properties in a cell's text


@dataclass(frozen=True)
class Tile:
    """All verdicts on one implementation of a contract, on one device."""

    block: Block
    verdicts: tuple[Verdict, ...]

    @cached_property
    def status(self) -> Status:
        """The worst."""
        found = {each.status for each in self.verdicts}
        return next(each for each in view.WORST_FIRST if each in found)

    @cached_property
    def largest(self) -> Verdict | None:
        """The verdict with the worst error; None where none was measured, and where it is not what the failure is about."""
        measured = [each for each in self.verdicts if view.worst_error(each) is not None]
        worst = max(measured, key=lambda each: each.worst or 0.0, default=None)
        broken = self.status in FAILED or self.status == "waived"
        return None if worst is None or (broken and (worst.worst or 0.0) <= 1) else worst

    def text(self, *, narrow: bool = False) -> str:
        """The mark, and the worst error in units of its limit."""
        mark = view.MARKS[self.status]
        return f"{mark} {view.units(self.largest.worst or 0.0, narrow=narrow)}" if self.largest else mark

    @property
    def failing(self) -> tuple[str, ...]:
        """The properties that fail."""
        return tuple(dict.fromkeys(each.property for each in self.verdicts if each.status in FAILED))

    @property
    def told(self) -> str:
        """The cell in words."""
        judged = view.tested(self.verdicts)
        counts = ", ".join(f"{number} {status}" for status, number in view.count(self.verdicts).items())
        more = f" and {len(self.failing) - NAMED} more" if len(self.failing) > NAMED else ""
        failing = [f"{', '.join(self.failing[:NAMED])}{more}"] if self.failing else []
        worst = self.largest
        at = (
            worst
            and f"at worst {view.units(worst.worst or 0.0)} of its limit ({worst.property}, {view.short_dtype(worst.dtype)})"
        )
        return "; ".join(
            [f"{self.block.title}: {counts}", *failing, *([at] if at else []), *filter(None, [view.kept_of(judged)])]
        )

    @property
    def is_kept(self) -> bool:
        """Whether nothing of it was judged in this run."""
        judged = view.tested(self.verdicts)
        return bool(judged) and all(map(view.kept, judged))


@dataclass(frozen=True)
class Column:
    """Implementations of one kind on one device, of which no contract has two."""

    kind: str
    device: str
    title: str
    """The implementation's name, where the column has but one; else empty: the cells have the names."""
    names: frozenset[str]
    first: bool
    """Whether it is the first of its kind."""


@dataclass(frozen=True)
class Row:
    """One contract: a tile, or None, in each column."""

    matrix: Matrix
    tiles: tuple[Tile | None, ...]

    @cached_property
    def status(self) -> Status:
        """The worst of its tiles."""
        found = {each.status for each in self.tiles if each}
        return next(each for each in view.WORST_FIRST if each in found)

    @property
    def words(self) -> str:
        """What a search finds it by: its name, those of its implementations, and of properties that fail."""
        tiles = [each for each in self.tiles if each]
        names = dict.fromkeys([self.matrix.contract, *(each.block.implementation for each in tiles)])
        return " ".join([*names, *dict.fromkeys(prop for each in tiles for prop in each.failing)]).lower()


@dataclass(frozen=True)
class Overview:
    """All contracts, in the order given, by family."""

    columns: tuple[Column, ...]
    families: dict[str, list[Row]]

    @property
    def kinds(self) -> list[tuple[str, int]]:
        """Each kind, and how many columns it has."""
        return list(Counter(each.kind for each in self.columns).items())

    @property
    def rows(self) -> list[Row]:
        """One for each contract."""
        return [row for rows in self.families.values() for row in rows]

    @property
    def statuses(self) -> set[Status]:
        """Those that a tile has."""
        return {tile.status for row in self.rows for tile in row.tiles if tile}

    @property
    def devices(self) -> list[str]:
        """Those that there are."""
        return list(dict.fromkeys(each.device for each in self.columns))


def overview(matrices: Sequence[Matrix]) -> Overview:
    """One cell for each implementation of each contract on each device."""
    tiles = {matrix.contract: _tiles(matrix) for matrix in matrices}
    columns = _columns(matrices)
    families: dict[str, list[Row]] = {}
    for matrix in matrices:
        row = Row(matrix, tuple(_in_column(tiles[matrix.contract], column) for column in columns))
        families.setdefault(family(matrix.contract), []).append(row)
    return Overview(columns, families)


def family(contract: str) -> str:
    """The file that the operation is in: `routers` of `routers.softmax_topk`."""
    return contract.rpartition(".")[0] or contract


def worth_showing(matrices: Sequence[Matrix]) -> list[Matrix]:
    """The matrices to print: all of a few contracts; of many, those in which anything but a pass is."""
    return [each for each in matrices if len(matrices) <= FEW or any(not {cell.status} <= QUIET for cell in each.cells.values())]


def _tiles(matrix: Matrix) -> list[Tile]:
    cells: dict[tuple[str, str], list[Verdict]] = {}
    for each in matrix.cells.values():
        cells.setdefault((each.implementation, each.device), []).append(each)
    return [Tile(block, tuple(cells[block.implementation, block.device])) for block in matrix.blocks]


def _columns(matrices: Sequence[Matrix]) -> tuple[Column, ...]:
    """As few as hold all implementations of a kind: a contract with one of its own needs no column of its own."""
    of: dict[tuple[str, str, str], set[str]] = {}  # the contracts of (kind, device, name)
    for matrix in matrices:
        for block in matrix.blocks:
            of.setdefault((block.kind, block.device, block.implementation), set()).add(matrix.contract)
    order = sorted(of, key=lambda each: (view.kind_order(each[0]), each[0], each[1], -len(of[each]), each[2]))
    columns: list[tuple[str, str, set[str], set[str]]] = []  # kind, device, names, contracts
    for key in order:
        kind, device, name = key
        free = [each for each in columns if each[:2] == (kind, device) and not each[3] & of[key]]
        if not free:
            free = [(kind, device, set(), set())]
            columns += free
        free[0][2].add(name)
        free[0][3].update(of[key])
    return tuple(
        Column(kind, device, next(iter(names)) if len(names) == 1 else "", frozenset(names), first=before != kind)
        for (kind, device, names, _), before in zip(columns, [None, *(each[0] for each in columns)], strict=False)
    )


def _in_column(tiles: Sequence[Tile], column: Column) -> Tile | None:
    """The contract's implementation that stands in a column."""
    fits = (
        each
        for each in tiles
        if (each.block.kind, each.block.device) == (column.kind, column.device) and each.block.implementation in column.names
    )
    return next(fits, None)
