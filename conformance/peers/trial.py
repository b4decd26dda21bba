"""`gaugeblock check --peers`: what is on trial, what its exit status says, and the table of VERDICTS.md."""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gaugeblock.conformance.engine.judging.verdict import FAILED, Verdict, exit_status
from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import LIBRARIES, UNDOCUMENTED, Peer, installed, peers
from gaugeblock.conformance.report import view

SOURCE = "gaugeblock.conformance.peers.candidates"
VERDICTS = Path(__file__).with_name("VERDICTS.md")
FINDINGS = Path(__file__).with_name("findings.toml")
MARKED = re.compile(r"(?<=<!-- peers:begin -->\n).*?(?=<!-- peers:end -->)", re.DOTALL)
HEADERS = ("peer", "library", "contract", "claims", "verdicts", "what fails, and why", "judged")
NAME = re.compile(r"^\| `([\w-]+)` \|")
OTHERS = "failures of peers are theirs, no failure of this run"


def told() -> str:
    """Which libraries are on trial, and which are not installed.

    Raises:
        ValueError: None is.
    """
    there = {LIBRARIES[name]: number for name, number in installed().items()}
    absent = [library for library in dict.fromkeys(LIBRARIES.values()) if library not in there]
    if not there:
        raise ValueError(f"--peers: none of {', '.join(absent)} is installed")
    on_trial = ", ".join(f"{library} {number}" for library, number in there.items())
    return f"on trial: {on_trial}" + (f"; not installed, so skipped: {', '.join(absent)}" if absent else "")


def versions() -> dict[str, str]:
    """Of the libraries on trial, by distribution."""
    return {LIBRARIES[name]: number for name, number in installed().items()}


def status_of(verdicts: Sequence[Verdict]) -> int:
    """The exit status of a run in which what fails is another's: as if it had passed, but for errors of the engine."""
    return exit_status([replace(each, status="pass") if each.status in FAILED - {"error"} else each for each in verdicts])


def findings() -> dict[str, str]:
    """Why peers fail what they fail, and claim less, in a few sentences each."""
    told = tomllib.loads(FINDINGS.read_text(encoding="utf-8"))
    return {name: each["why"] for name, each in told.items()}


def update(path: Path, verdicts: Sequence[Verdict], date: str) -> None:
    """Writes the rows of the peers that were judged into the table of a Markdown file, and leaves the others as they are.

    Raises:
        ValueError: The file cannot be read or written, or has no lines `<!-- peers:begin -->` and `<!-- peers:end -->`.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if not MARKED.search(text):
            raise ValueError(f"{path}: no lines <!-- peers:begin --> and <!-- peers:end -->")
        found = {name: row for name, row in rows_of(text).items() if not _is_gone(name)} | rows(verdicts, date)
        path.write_text(MARKED.sub(lambda _: table(found.values()), text, count=1), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None


def rows_of(text: str) -> dict[str, str]:
    """The rows of a Markdown file's table, by peer."""
    marked = MARKED.search(text)
    lines = marked[0].splitlines() if marked else []
    return {match[1]: line for line in lines if (match := NAME.match(line))}


def table(rows: Iterable[str]) -> str:
    """Sorted by contract, then by name."""
    ordered = sorted(rows, key=lambda row: (row.split(" | ")[2], row))
    return "\n".join(["", _line(HEADERS), _line(["---"] * len(HEADERS)), *ordered, "", ""])


def rows(verdicts: Sequence[Verdict], date: str) -> dict[str, str]:
    """A row for each peer that was judged, by its name."""
    number, why = versions(), findings()
    found = {}
    for each in peers():
        own = [verdict for verdict in view.tested(verdicts) if verdict.implementation == each.name]
        if own:
            cells = [
                f"`{each.name}`", f"{each.library} {number[each.library]}", f"`{each.contract}`", _claims(each), _outcome(own),
                why.get(each.name, ""), date,
            ]  # fmt: skip
            found[each.name] = _line(cells)
    return found


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _claims(each: Peer) -> str:
    """What is claimed beyond or short of what peers claim by default, but for dtypes."""
    words: Mapping[str, object] = {name: value for name, value in each.claims.items() if name not in ("dtypes", "kind", "only")}
    claimed = [f"{name}={value}" for name, value in words.items() if UNDOCUMENTED.get(name) != value]
    return ", ".join(claimed + ([f"`{each.claims['only']}`"] if "only" in each.claims else []))


def _outcome(verdicts: Sequence[Verdict]) -> str:
    """What came of each dtype; those of which the same came together."""
    same: dict[str, list[str]] = {}
    for dtype, judged in ((dtype, [each for each in verdicts if each.dtype == dtype]) for dtype in DTYPES):
        if not judged:
            continue
        failing = [each.property for each in judged if each.status in FAILED]
        outcome = f"{len(failing)} of {len(judged)} fail: {', '.join(failing)}" if failing else f"all {len(judged)} conform"
        same.setdefault(outcome, []).append(view.short_dtype(dtype))
    return "; ".join(f"{', '.join(dtypes)}: {outcome}" for outcome, dtypes in same.items())


def _is_gone(name: str) -> bool:
    """Whether a row's library is installed, and has no such peer any more."""
    return name.partition("-")[0] in installed() and name not in {each.name for each in peers()}
