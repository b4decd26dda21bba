"""`gaugeblock bench --against REVISION`: is this working tree slower, or does it need more, than an earlier revision?

The revision is laid out in a temporary folder, and the two trees are measured in turn, A B A B, each time in a fresh process:
what differs from process to process (addresses, caches, a slow minute of the machine) falls on both alike. Counters are the same
every time, so any increase fails. A time fails only if it is longer by a ratio and by a difference and in nearly all rounds, and
again when only what was flagged is measured once more; on hosted machines identical code differs by up to 1.3 times.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

UNCHANGED, WORSE, NOTHING_COMPARED = 0, 1, 3
ROUNDS = 5  # of both trees
RATIO = 1.1
SHORTEST = 50e-6  # seconds: what a difference must exceed ...
DEVIATIONS = 3.0  # ... and by how many median deviations of the revision's own rounds
CHANCE = 0.005  # that rounds of equal code would fall so: of five and five, every one must be longer
COUNTED = ("bytes_allocated", "peak_bytes", "operations", "kernels")

Key = tuple[str, ...]  # contract, workload, direction, implementation; for counters without the workload


@dataclass
class Measured:
    """What the rounds of one tree found."""

    times: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Median seconds of a call, one of each round."""
    counters: dict[Key, dict[str, int | None]] = field(default_factory=dict)
    """Of the first round."""
    broken: dict[Key, str] = field(default_factory=dict)
    """Why an implementation raised, or that its results were wrong."""

    def add(self, document: dict) -> None:
        """Adds what `gaugeblock bench --json` wrote."""
        for row in (*document["rows"], *document["counters"]):
            names = ("contract", "workload", "direction", "implementation")
            key = tuple(row[name] for name in names if name in row)
            if row["status"] in ("failed", "wrong"):
                self.broken[key] = row["reason"]
            elif row["status"] == "measured" and "median" in row:
                self.times[key].append(row["median"])
            elif row["status"] == "measured":
                self.counters[key] = {name: row[name] for name in COUNTED}


@dataclass(frozen=True)
class Change:
    """One number, before and after; times in seconds, medians of the rounds."""

    key: Key
    what: str
    before: float
    after: float
    worse: bool


def main(options: argparse.Namespace) -> int:
    """Measures, prints what changed, and says whether anything got worse.

    Returns:
        0; 1 if something got worse; 3 if there was nothing that both trees could measure.

    Raises:
        ValueError: If the revision does not exist, or one of the trees cannot be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        trees = (lay_out(options.against, Path(folder)), _repository())
        if not options.candidates and not (trees[1] / "gaugeblock").is_dir():
            raise ValueError("--against: nothing here depends on the revision; name the file that registers your implementations")
        changes = compare(*rounds(trees, _arguments(options), Path(folder), counters=True))
        slower = [each for each in changes if each.what == "time" and each.worse]
        if slower:  # once more, by itself: what was chance does not come again
            print(f"{len(slower)} times look longer; measured once more")
            again = compare(*rounds(trees, _arguments(options, slower), Path(folder), counters=False))
            changes = [_confirmed(each, again) for each in changes]
    print(render(changes))
    if not changes:
        print(f"nothing was measured both at {options.against} and here")
        return NOTHING_COMPARED
    return WORSE if any(each.worse for each in changes) else UNCHANGED


def lay_out(revision: str, folder: Path) -> Path:
    """The repository of the current folder as it was at a revision.

    Raises:
        ValueError: If there is no such revision.
    """
    archive = subprocess.run(["git", "archive", revision], cwd=_repository(), capture_output=True, check=False)
    if archive.returncode:
        raise ValueError(f"--against {revision}: {archive.stderr.decode().strip().splitlines()[-1]}")
    tree = folder / "revision"
    tree.mkdir()
    subprocess.run(["tar", "--extract", "--directory", str(tree)], input=archive.stdout, check=True)
    return tree


def rounds(trees: Sequence[Path], arguments: Sequence[str], folder: Path, *, counters: bool) -> list[Measured]:
    """Measures the repositories in turn, each from the folder that is the current one here.

    Args:
        counters: Whether the first round counts too; another would count the same.

    Raises:
        ValueError: If one cannot be measured, with the last line of what it said.
    """
    found = [Measured() for _ in trees]
    path, inside = folder / "measured.json", Path.cwd().relative_to(_repository())
    for number in range(ROUNDS):
        counting = ["--counters"] if counters and number == 0 else []
        for tree, measured in zip(trees, found, strict=True):
            path.unlink(missing_ok=True)
            command = [sys.executable, "-m", "gaugeblock.conformance.cli", "bench", *arguments, *counting, "--json", str(path)]
            first = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
            environment = os.environ | {"PYTHONPATH": first}
            run = subprocess.run(command, cwd=tree / inside, env=environment, capture_output=True, text=True, check=False)
            if not path.exists():
                reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
                raise ValueError(f"{tree} cannot be measured: {reason}")
            measured.add(json.loads(path.read_text()))
    return found


def compare(before: Measured, after: Measured) -> list[Change]:
    """Every number that both trees have."""
    changes = []
    for key in before.times.keys() & after.times.keys():
        old, new = before.times[key], after.times[key]
        medians = (statistics.median(old), statistics.median(new))
        changes.append(Change(key, "time", *medians, worse=is_slower(old, new)))
    for key in before.counters.keys() & after.counters.keys():
        for name, old_count in before.counters[key].items():
            new_count = after.counters[key][name]
            if old_count is not None and new_count is not None:
                changes.append(Change(key, name, old_count, new_count, worse=new_count > old_count))
    for key in after.broken.keys() - before.broken.keys():
        changes.append(Change(key, after.broken[key], math.nan, math.nan, worse=True))
    return sorted(changes, key=lambda each: (each.key, each.what))


def is_slower(before: Sequence[float], after: Sequence[float]) -> bool:
    """Longer by a ratio, by a difference, and in rank."""
    old, new = statistics.median(before), statistics.median(after)
    deviation = statistics.median(abs(each - old) for each in before)
    is_far = new > RATIO * old and new - old > max(SHORTEST, DEVIATIONS * deviation)
    return is_far and chance(before, after) < CHANCE


def chance(before: Sequence[float], after: Sequence[float]) -> float:
    """The share of all ways to deal the times to the two trees in which the second gets ranks as high (Mann-Whitney, exact)."""
    pooled = sorted([*before, *after])
    ranks = [statistics.mean(place for place, other in enumerate(pooled) if other == each) for each in pooled]
    found = sum(ranks[pooled.index(each)] for each in after)
    sums = [sum(hand) for hand in itertools.combinations(ranks, len(after))]
    return sum(each >= found for each in sums) / len(sums)


def render(changes: Sequence[Change]) -> str:
    """All times, and the counters that changed."""
    shown = [each for each in changes if each.what == "time" or each.before != each.after]  # NaN is no number's equal
    table = [
        [
            " ".join(each.key),
            each.what,
            _text(each, each.before),
            _text(each, each.after),
            f"{each.after / each.before:.2f}" if each.before > 0 else "",
            "WORSE" if each.worse else "",
        ]
        for each in shown
    ]
    same = len(changes) - len(shown)
    headers = ("", "what", "before", "after", "ratio", "")
    return f"{tabulate(table, headers=headers, disable_numparse=True)}\n{same} counters are the same"


def _confirmed(change: Change, again: Sequence[Change]) -> Change:
    second = next((each for each in again if (each.key, each.what) == (change.key, change.what)), None)
    return second if change.what == "time" and change.worse and second else change


def _repository() -> Path:
    """The root of the repository around the current folder.

    Raises:
        ValueError: If there is none.
    """
    run = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError("--against: this folder is in no git repository")
    return Path(run.stdout.strip())


def _arguments(options: argparse.Namespace, only: Sequence[Change] = ()) -> list[str]:
    """The options that say what is measured: what these do, or only where something changed."""
    named = {"contract": options.contract, "workload": options.workload, "implementation": options.implementation}
    if only:
        contracts, workloads, _, names = zip(*(each.key for each in only), strict=True)
        named = {"contract": contracts, "workload": workloads, "implementation": names}
    repeated = [text for name, values in named.items() for value in sorted(set(values)) for text in (f"--{name}", value)]
    return [*options.candidates, "--quick", "--direction", options.direction, *repeated]


def _text(change: Change, value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{1e3 * value:.4g} ms" if change.what == "time" else f"{value:,.0f}"
