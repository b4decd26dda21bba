"""Verdicts that need not be reached again."""

import argparse
import datetime
import time
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from gaugeblock.conformance.engine.devices import torchrun_world_size
from gaugeblock.conformance.engine.exploration import PROFILES, Profile
from gaugeblock.conformance.engine.judging.verdict import Verdict
from gaugeblock.conformance.engine.kept.digest import Digests
from gaugeblock.conformance.engine.kept.store import Store, folder_of
from gaugeblock.conformance.engine.kept.trees import Disk
from gaugeblock.conformance.engine.registry import ENTRY_POINTS
from gaugeblock.conformance.engine.trial import Property, Subject

TOGETHER_SECONDS = 1.0  # verdicts that are reached within are written together


class KeptVerdicts:
    """What is kept of a run's verdicts, and what was kept by others.

    What passes is kept, with its coverage and its statistics. What fails is judged again: whoever looks at a failure wants to
    know whether it comes again, and by which command. So is what the time was too short for, and what `thorough` draws anew.

    Args:
        store: Where; None for nowhere.
        fresh: Nothing that is kept is used.
        candidates: Whether the run has candidates, who must not write there.
        git: The commit of the environment.
    """

    def __init__(
        self, store: Store | None, profile: Profile, *, fresh: bool, candidates: bool, git: Mapping[str, Any] | None
    ) -> None:
        self.store, self.profile, self.fresh, self.candidates = store, profile, fresh, candidates
        self._disk = Disk()
        self.digests = Digests(self._disk)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        commit = f"{git['commit']}{' with uncommitted changes' if git['dirty'] else ''}" if git else ""
        self.judged = {"date": now, "commit": commit}
        self._reached: list[tuple[Subject, Property, Verdict]] = []
        self._written = time.monotonic()
        self._saved = self._full = False

    def find(self, subject: Subject, prop: Property) -> Verdict | None:
        """The verdict, if it was reached before under the same circumstances."""
        if self.store is None:
            return None
        digest = self.digests.of(subject, prop, self.profile)  # of a fresh one too: before the candidate is loaded
        verdict = self.store.load(digest) if digest and not self.fresh else None
        return verdict if verdict and _is_of(verdict, subject, prop) and is_kept(verdict) else None

    def keep(self, subject: Subject, prop: Property, verdict: Verdict) -> None:
        """Keeps a verdict that was just reached, within a second or so, unless what it depends on has changed meanwhile."""
        if self.store is None:
            return
        self._reached.append((subject, prop, verdict))
        if time.monotonic() - self._written >= TOGETHER_SECONDS:
            self._write(self.store)

    def _write(self, store: Store) -> None:
        """Writes what was reached since the last time: to look at 200 files for each verdict takes as long as all the rest."""
        files = [self.digests.files(subject, prop) for subject, prop, _ in self._reached]
        changed = self._disk.changed(frozenset().union(*files))
        for (subject, prop, verdict), own in zip(self._reached, files, strict=True):
            digest = self.digests.of(subject, prop, self.profile)
            if digest is None or own & changed:
                continue
            if not is_kept(verdict):
                store.forget(digest)
            elif not self._full:
                try:
                    store.save(digest, verdict, self.judged)
                    self._saved = True
                except OSError:  # the disk is full, or the folder is gone
                    self._full = True
        self._reached.clear()
        self._written = time.monotonic()

    def close(self) -> None:
        """Writes the rest; takes away what a candidate may have written, and what is too old."""
        if self.store is None:
            return
        self._write(self.store)
        if self.candidates:
            self.store.remove_foreign()
        if self._saved:
            self.store.prune()


def open_kept(options: argparse.Namespace, git: Mapping[str, Any] | None) -> KeptVerdicts:
    """The verdicts that are kept where the call says, or the environment; none under torchrun, whose machines differ.

    Raises:
        ValueError: If the folder of the call cannot be used.
    """
    profile, folder, store = PROFILES[options.profile], folder_of(options.kept), None
    try:
        if folder is not None and profile.derandomize and not torchrun_world_size():
            store = Store(folder)
    except OSError as error:
        if options.kept is not None:
            raise ValueError(f"--kept {folder}: {error.strerror}") from None
    candidates = bool(options.candidates) or bool(entry_points(group=ENTRY_POINTS))
    return KeptVerdicts(store, profile, fresh=options.fresh, candidates=candidates, git=git)


def is_kept(verdict: Verdict) -> bool:
    """Whether a verdict would be the same if it was reached again, and nobody asks to see it come again."""
    complete = verdict.coverage is None or not verdict.coverage.lacking
    return verdict.status in ("pass", "warning") and bool(verdict.cases) and verdict.failure is None and complete


def _is_of(verdict: Verdict, subject: Subject, prop: Property) -> bool:
    whose = subject.implementation
    found = verdict.contract, verdict.implementation, verdict.property, verdict.dtype, verdict.device
    return found == (whose.contract, whose.name, prop.name, subject.dtype, subject.device)
