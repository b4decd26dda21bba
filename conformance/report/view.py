"""What every view of a list of verdicts shares: marks, numbers, the matrix, and the sentence that sums it up."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gaugeblock.conformance.engine.judging.verdict import FAILED, Status, Verdict

MARKS: dict[Status, str] = {
    "pass": "✓", "warning": "!", "fail": "✗", "not supported": "–", "waived": "w", "crash": "☠", "timeout": "⏱", "error": "E",
}  # fmt: skip
WORST_FIRST: tuple[Status, ...] = ("error", "crash", "timeout", "fail", "waived", "warning", "pass", "not supported")
MEANINGS: dict[Status, str] = {
    "pass": "pass",
    "warning": "warning: little of the budget is left, or less was visited than should have been",
    "fail": "fail",
    "not supported": "not supported",
    "waived": "waived: a known failure",
    "crash": "crash: the process died",
    "timeout": "timeout",
    "error": "error of the engine or the contract: no word on the candidate",
}
NOT_OF_CONTRACT = "the contract has no"  # begins the reason why a property makes no row of a contract's matrix
SPARING = "Visited: of the pairs (or classes) of sizes, options and values there are. *: built in, of which quick visits few."
MEASURED = ("parity", "gradients")  # properties whose worst error stands beside the mark
KINDS = ("reference", "triton", "distributed", "jax", "compiled", "user")
SHORT_COMMIT = 10
KEPT = "°"  # beside the mark of a verdict that was not judged again
LONGEST_SLUG = 200  # file names may have 255 bytes
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def short_dtype(dtype: str) -> str:
    """Four letters for a column's head."""
    return DTYPES.get(dtype, dtype)


def units(value: float, *, narrow: bool = False) -> str:
    """An error in units of its limit in at most four characters: `0.31`, `12.3`, `1e5`, `∞`; three if narrow: `.31`, `12`."""
    if math.isinf(value):
        return "∞"
    for bound, digits in ((0.995, 2), (9.95, 1), (999.5, 0)) if narrow else ((9.995, 2), (99.95, 1), (9999.5, 0)):
        if value < bound:
            return f"{value:.{digits}f}".removeprefix("0" if narrow else "")
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")


def printable(text: str) -> str:
    """The text with control characters and lone surrogates as escapes: terminals and XML choke on them."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


def slug(verdict: Verdict) -> str:
    """The verdict's identity as the name of a file or an anchor."""
    joined = verdict.identity.replace("/", "__")
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", joined)[:LONGEST_SLUG]
    if plain == joined:
        return plain
    return f"{plain}-{hashlib.sha1(ascii(joined).encode(), usedforsecurity=False).hexdigest()[:8]}"


def worst_error(verdict: Verdict) -> float | None:
    """The error to show beside the mark of a measured property, in units of its limit.

    None where there is none, and where a failure's own case is not among the statistics: a small number beside a cross
    would mislead.
    """
    if verdict.property not in MEASURED or verdict.worst is None:
        return None
    broken = verdict.status in FAILED or verdict.status == "waived"
    return None if broken and verdict.worst <= 1 else verdict.worst


def cell_text(verdict: Verdict | None, *, narrow: bool = False) -> str:
    """`✓`, `✗`, or with the worst error `✓ 0.31`; nothing where there is no verdict. Narrow, what was kept is marked."""
    if verdict is None:
        return ""
    error = worst_error(verdict)
    mark = f"{MARKS[verdict.status]}{KEPT if verdict.kept and narrow else ''}"
    return mark if error is None else f"{mark.ljust(2)}{units(error, narrow=narrow)}"


@dataclass(frozen=True)
class Block:
    """One implementation on one device: neighbouring columns of a matrix, one for each dtype."""

    title: str
    kind: str
    implementation: str
    device: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """The verdicts on one contract: properties down, implementations and dtypes across."""

    contract: str
    properties: tuple[str, ...]
    blocks: tuple[Block, ...]
    cells: dict[tuple[str, str, str, str], Verdict]

    def cell(self, prop: str, block: Block, dtype: str) -> Verdict | None:
        """The verdict in one cell, if there is one."""
        return self.cells.get((prop, block.implementation, dtype, block.device))


def matrices(verdicts: Sequence[Verdict]) -> list[Matrix]:
    """One matrix for each contract.

    Contracts and properties stay in the order given. Columns do not: workers answer in any order, so implementations
    are sorted by kind and name, and dtypes from wide to narrow.
    """
    by_contract: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_contract.setdefault(verdict.contract, []).append(verdict)
    return [_matrix(contract, rows) for contract, rows in by_contract.items()]


def _matrix(contract: str, verdicts: list[Verdict]) -> Matrix:
    several_devices = len({each.device for each in verdicts}) > 1
    dtypes: dict[tuple[str, str, str], set[str]] = {}
    for each in verdicts:
        dtypes.setdefault((each.kind, each.implementation, each.device), set()).add(each.dtype)
    blocks = [
        Block(
            f"{name} {device}" if several_devices else name,
            kind,
            name,
            device,
            tuple(sorted(found, key=_dtype_order)),
        )
        for (kind, name, device), found in sorted(dtypes.items(), key=lambda each: (kind_order(each[0][0]), each[0]))
    ]
    judged = {each.property for each in verdicts if each.status != "not supported"}
    absent = {each.property for each in verdicts if each.reason.startswith(NOT_OF_CONTRACT)} - judged
    names = dict.fromkeys(each.property for each in verdicts)
    properties = tuple(name for name in names if name not in absent) or tuple(names)
    cells = {(each.property, each.implementation, each.dtype, each.device): each for each in verdicts}
    return Matrix(contract, properties, tuple(blocks), cells)


def kind_order(kind: str) -> int:
    """Where a kind's columns stand among the others."""
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def _dtype_order(dtype: str) -> tuple[int, str]:
    return list(DTYPES).index(dtype) if dtype in DTYPES else len(DTYPES), dtype


def count(verdicts: Sequence[Verdict]) -> dict[Status, int]:
    """How many verdicts have each status that occurs, the worst status first."""
    found = Counter(each.status for each in verdicts)
    return {status: found[status] for status in WORST_FIRST if found[status]}


def visited(verdict: Verdict) -> str:
    """What a property has visited, and `*` where that is less on purpose."""
    if verdict.coverage is None:
        return ""
    return f"{verdict.coverage}{'*' if verdict.coverage.sparing and verdict.coverage.visited < verdict.coverage.due else ''}"


def least_visited(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """For each contract and property, the verdict that visited the smallest part."""
    found: dict[tuple[str, str], Verdict] = {}
    for each in verdicts:
        if each.coverage is not None:
            key = each.contract, each.property
            found[key] = min(found.get(key, each), each, key=_part_visited)
    return list(found.values())


def _part_visited(verdict: Verdict) -> float:
    assert verdict.coverage is not None
    return verdict.coverage.visited / max(1, verdict.coverage.due)


def kept(verdict: Verdict) -> str:
    """`kept of 2026-11-20, commit abc1234` of a verdict that was not judged again; `+`: with uncommitted changes."""
    if verdict.kept is None or verdict.status == "not supported":
        return ""
    commit, _, changed = verdict.kept["commit"].partition(" ")
    commit = commit[:SHORT_COMMIT] + ("+" if changed else "")
    return f"kept of {verdict.kept['date'][:10]}" + (f", commit {commit}" if commit else "")


def remark(verdict: Verdict) -> str:
    """Its reason, and whether it was kept."""
    return "; ".join(filter(None, (verdict.reason, kept(verdict))))


def kept_of(verdicts: Sequence[Verdict]) -> str:
    """`all kept of 2026-11-20, commit abc1234`, `3 of 12 kept`, or an empty string."""
    whence = [text for each in verdicts if (text := kept(each))]
    several = len(set(whence)) > 1
    if not whence:
        return ""
    number = "all" if len(whence) == len(verdicts) else f"{len(whence):,} of {len(verdicts):,}"
    return f"{number} kept, the latest {max(whence).removeprefix('kept ')}" if several else f"{number} {whence[0]}"


def nowhere(verdicts: Sequence[Verdict]) -> list[str]:
    """Properties that applied to nothing of what was judged: nobody should believe that they were tested."""
    somewhere = {each.property for each in tested(verdicts)}
    return [name for name in dict.fromkeys(each.property for each in verdicts) if name not in somewhere]


def tested(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Those that came of running something."""
    return [each for each in verdicts if each.status != "not supported"]


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """The whole run in one sentence."""
    judged = tested(verdicts)
    failed = sum(each.status in FAILED for each in judged)
    waived = sum(each.status == "waived" for each in judged)
    if not judged:
        return "nothing was tested"
    if failed:
        return f"{failed:,} of {len(judged):,} verdicts {'fails' if failed == 1 else 'fail'}"
    if waived:
        return f"{len(judged) - waived:,} of {len(judged):,} verdicts conform, {waived} {'is' if waived == 1 else 'are'} waived"
    return f"all {len(judged):,} verdicts conform" if len(judged) > 1 else "the one verdict conforms"


def duration(seconds: float) -> str:
    """`0.4 s`, `58 s`, `12 min 5 s` or `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
