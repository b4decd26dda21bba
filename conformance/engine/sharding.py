"""A part of a run for each of several machines: every verdict in exactly one, parts that take about as long as each other."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from gaugeblock.conformance.engine.judging.verdict import Verdict, exit_status
from gaugeblock.conformance.engine.selection import source_of
from gaugeblock.conformance.engine.since import Since
from gaugeblock.conformance.engine.trial import Property, Subject
from gaugeblock.conformance.exit_status import CONFORM, NOTHING_TESTED

# Relative to the other properties: those that are about numbers visit every regime, and compute error budgets.
OF_NUMBERS = 6.0
OF_SEVERAL_DEVICES = 3.0  # processes that wait for each other
TINY = 1e-6
STEEPNESS = 1.5  # a contract of which fewer cases are judged, since each is dear, takes longer for all that


class Shard(NamedTuple):
    """The part `number`, from 1, of so many."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def shard(text: str) -> Shard:
    """`3/8` as a shard.

    Raises:
        ValueError: If it is none.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    found = Shard(int(match[1]), int(match[2])) if match else Shard(0, 0)
    if not 1 <= found.number <= found.of:
        raise ValueError(f"--shard must be NUMBER/OF with 1 <= NUMBER <= OF, such as 3/8, got {text!r}")
    return found


def expected_seconds(subject: Subject, prop: Property) -> float:
    """About how long a verdict takes, in units of the cheapest."""
    devices = OF_SEVERAL_DEVICES if subject.implementation.world_sizes else 1.0
    return (OF_NUMBERS if prop.every_dtype else 1.0) * devices / subject.contract.cases**STEEPNESS


def cut(work: Sequence[tuple[Subject, Property]], seconds: Sequence[float], which: Shard) -> list[int]:
    """The positions, in order, of what belongs to a shard; whatever is kept, and on every machine.

    Work that shares cases and budgets lies side by side, and the whole is cut into pieces that take about as long.
    """

    def neighbours(position: int) -> tuple[bool, str, str, str, str, str]:
        subject, prop = work[position]
        whose = subject.implementation
        return subject.on_ranks, whose.contract, subject.device, subject.dtype, prop.name, whose.name

    lengths = [each + TINY for each in seconds]  # what is not judged belongs somewhere too
    share, before, found = sum(lengths) / which.of, 0.0, []
    for position in sorted(range(len(work)), key=neighbours):
        middle = before + lengths[position] / 2
        if min(int(middle / share), which.of - 1) == which.number - 1:
            found.append(position)
        before += lengths[position]
    return sorted(found)


@dataclass(frozen=True)
class Part:
    """Which part of a run is judged."""

    since: dict[str, Any] | None = None
    """The revision, if what has not been touched since is left out; `untouched` is how many verdicts that are, `pins` the files
    that say which packages are installed, if they were changed."""
    shard: dict[str, Any] | None = None
    """Which shard, if it is one; `positions` are those of its verdicts in the whole of `total`."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {name: each for name, each in asdict(self).items() if each is not None}

    @property
    def told(self) -> str:
        """In words."""
        lines = []
        if self.since:
            when = f"{self.since['revision']} ({self.since['commit'][:10]})"
            every = self.since["touched"] + self.since["untouched"]
            nothing = f"nothing was judged: none of {every} verdicts can have been touched since {when}"
            left_out = f"{self.since['touched']} of {every} verdicts can have been touched since {when}; no others were judged"
            all_of_it = f"since {when} {', '.join(self.since['pins'])} changed, so that anything may have been touched"
            lines.append(all_of_it if self.since["pins"] else left_out if self.since["touched"] else nothing)
        if self.shard:
            lines.append(
                "shard {number}/{of}: {judged} of {total} verdicts".format(judged=len(self.shard["positions"]), **self.shard)
            )
        return "\n".join(lines)

    def exit_status(self, verdicts: Sequence[Verdict]) -> int:
        """That of the verdicts; a shard with nothing to test is no mistake, nor is a change that touches nothing."""
        status = exit_status(verdicts)
        untouched = self.since is not None and not self.since["touched"]
        return CONFORM if status == NOTHING_TESTED and (self.shard or untouched) else status


def select_part(
    work: Sequence[tuple[Subject, Property]], idle: Sequence[bool], options: argparse.Namespace
) -> tuple[list[int], Part | None]:
    """The positions of what is judged, as `--since` and `--shard` say.

    Args:
        idle: Where nothing is to be judged.

    Raises:
        ValueError: If there is no such revision, or no such shard.
    """
    which = None if options.shard is None else shard(options.shard)
    positions = list(range(len(work)))
    told: dict[str, Any] | None = None
    if options.since is not None:
        since = Since(options.since, _sources(work) if options.candidates else ())
        positions = [each for each in positions if since.touches(*work[each])]
        told = {
            "revision": since.revision,
            "commit": since.commit,
            "pins": since.pins,
            "touched": len(positions),
            "untouched": len(work) - len(positions),
        }
    if which is None:
        return positions, Part(told) if told else None
    mine = cut(
        [work[each] for each in positions], [0.0 if idle[each] else expected_seconds(*work[each]) for each in positions], which
    )
    about: dict[str, Any] = {"number": which.number, "of": which.of, "total": len(positions), "positions": mine}
    return [positions[each] for each in mine], Part(told, about)


def _sources(work: Sequence[tuple[Subject, Property]]) -> list[str]:
    """The files and modules of candidates."""
    found = [source for subject, _ in work if (source := source_of(subject.implementation))]
    return list(dict.fromkeys(found))
