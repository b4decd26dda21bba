"""Where kept verdicts lie: a folder with a small file for each, named by the digest of all that the verdict depends on.

Only the process that judges writes there, and nothing that came while candidates ran is believed: what was not there when the run
began, and was not written by it, is taken away at its end. That is no protection from a candidate that somebody runs elsewhere,
with the same rights: it could write to this folder as it could to this package.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from gaugeblock.conformance.engine.judging.verdict import Verdict
from gaugeblock.conformance.engine.kept.trees import stamp

FORMAT = 1
VARIABLE = "GAUGEBLOCK_KEPT"
OFF = "off"  # as a folder's name: nothing is kept
MOST_BYTES = 256 << 20
MOST_DAYS = 60  # since a verdict was last of use
DAY = 86_400 * 10**9  # nanoseconds
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Verdicts kept by gaugeblock; see https://bford.info/cachedir/\n"


def default_folder() -> Path | None:
    """Where verdicts are kept unless the call says otherwise; None for nowhere."""
    named = os.environ.get(VARIABLE, "")
    if named:
        return None if named == OFF else Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gaugeblock" / "verdicts"


def folder_of(option: str | None) -> Path | None:
    """Where verdicts are kept, as the call says, or else the environment."""
    if option is None:
        return default_folder()
    return None if option == OFF else Path(option)


def holds_something(folder: Path | None) -> bool:
    """Whether any verdict may be kept there."""
    try:
        return folder is not None and any(each.is_dir() for each in folder.iterdir())
    except OSError:
        return False


class Store:
    """The folder, as it was when it was opened, and what was written to it since.

    Raises:
        OSError: If the folder can be neither made nor read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        tag = folder / "CACHEDIR.TAG"
        if not tag.exists():
            tag.write_text(TAG)
        self._before = {path: stamp(path) for path in self._entries()}
        self._ours: dict[str, tuple[int, ...]] = {}

    def load(self, digest: str) -> Verdict | None:
        """The verdict under a digest, with when it was reached; None if there is none, or none that can be believed."""
        path = self._path(digest)
        if stamp(path) != self._before.get(path, ()) or not stamp(path):
            return None
        try:
            entry = json.loads(Path(path).read_text(encoding="utf-8"))
            if (entry["format"], entry["digest"], entry["sum"]) != (FORMAT, digest, _sum(entry)):
                return None
            verdict = Verdict.from_json(entry["verdict"] | {"kept": entry["judged"]})
            if time.time_ns() - stamp(path)[2] > DAY:  # not each time: another run would take it for changed
                os.utime(path)
                self._before[path] = stamp(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return verdict

    def save(self, digest: str, verdict: Verdict, judged: dict[str, str]) -> None:
        """Keeps a verdict, at once and whole or not at all.

        Raises:
            OSError: If it cannot be written.
        """
        entry = {"format": FORMAT, "digest": digest, "judged": judged, "verdict": verdict.to_json()}
        path = self._path(digest)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".part")
        try:
            with open(number, "w", encoding="utf-8") as file:
                file.write(json.dumps(entry | {"sum": _sum(entry)}))  # `dump` encodes piece by piece: half as long again
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._ours[path] = stamp(path)

    def forget(self, digest: str) -> None:
        """Takes away what is under a digest."""
        with suppress(OSError):
            os.unlink(self._path(digest))

    def remove_foreign(self) -> None:
        """Takes away what has come, or was changed, since the folder was opened, and not by this process."""
        for path in self._entries():
            if stamp(path) not in (self._before.get(path), self._ours.get(path)):
                with suppress(OSError):
                    os.unlink(path)

    def prune(self, most_bytes: int = MOST_BYTES, most_days: float = MOST_DAYS) -> None:
        """Takes away what was of no use for long, and what is too much, the oldest first."""
        found = [(stamp(path), path) for path in self._entries()]
        newest = sorted(((each[2], each[1], path) for each, path in found if each), reverse=True)
        total, oldest = 0, time.time_ns() - int(most_days * DAY)
        for when, size, path in newest:
            total += size
            if total > most_bytes or when < oldest:
                with suppress(OSError):
                    os.unlink(path)

    def _path(self, digest: str) -> str:
        return os.path.join(self.folder, digest[:2], f"{digest}.json")

    def _entries(self) -> Iterator[str]:
        """All files of entries, also of those that were never finished."""
        with suppress(OSError):
            for folder in os.listdir(self.folder):
                inside = os.path.join(self.folder, folder)
                if len(folder) == 2 and os.path.isdir(inside):
                    yield from (os.path.join(inside, name) for name in os.listdir(inside) if name.endswith((".json", ".part")))


def _sum(entry: dict[str, Any]) -> str:
    """Of what an entry says: a file that was damaged says something else."""
    said = json.dumps([entry["digest"], entry["judged"], entry["verdict"]], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()
