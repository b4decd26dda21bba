"""Files as they are now, and as they were at a revision of git."""

import hashlib
import os
import site
import subprocess
import sysconfig
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple, Protocol

MOST_LINKS = 40  # to links
LARGE = 16 << 20  # bytes, from which on a file is told by its size and time alone


class Entries(NamedTuple):
    """The names in a folder."""

    files: frozenset[str]
    folders: frozenset[str]


NOTHING = Entries(frozenset(), frozenset())


class Tree(Protocol):
    """Files by absolute path."""

    def read(self, path: str) -> bytes | None:
        """A file's bytes; None where there is none."""

    def entries(self, folder: str) -> Entries:
        """What lies in a folder; nothing where there is none."""

    def hash(self, path: str) -> str:
        """A digest of a file's bytes; of a large one, of its size and time; an empty string where there is none."""


class Disk:
    """The files as they are, each read once."""

    def __init__(self) -> None:
        self._stamps: dict[str, tuple[int, ...]] = {}
        self._texts: dict[str, bytes | None] = {}
        self._hashes: dict[str, str] = {}
        self._entries: dict[str, Entries] = {}

    def read(self, path: str) -> bytes | None:
        """A file's bytes; None where there is none."""
        if path not in self._texts:
            self._stamps[path] = stamp(path)
            try:
                with open(path, "rb") as file:
                    self._texts[path] = file.read()
            except OSError:
                self._texts[path] = None
        return self._texts[path]

    def entries(self, folder: str) -> Entries:
        """What lies in a folder."""
        if folder not in self._entries:
            try:
                with os.scandir(folder) as found:
                    sorts = [(each.name, each.is_dir()) for each in found]
            except OSError:
                sorts = []
            files, folders = ([name for name, is_folder in sorts if is_folder is wanted] for wanted in (False, True))
            self._entries[folder] = Entries(frozenset(files), frozenset(folders))
        return self._entries[folder]

    def hash(self, path: str) -> str:
        """A digest of a file."""
        if path not in self._hashes:
            size = stamp(path)[1:2]
            if size and size[0] >= LARGE:
                self._stamps[path] = stamp(path)
                self._hashes[path] = f"large {self._stamps[path][1:3]}"
            else:
                held = path in self._texts
                text = self.read(path)
                self._hashes[path] = "" if text is None else hashlib.sha256(text).hexdigest()
                if not held:
                    del self._texts[path]  # data, of which nothing else is asked
        return self._hashes[path]

    def changed(self, paths: Iterable[str]) -> frozenset[str]:
        """Which of these files, as far as they were read, are others by now."""
        return frozenset(path for path in paths if path in self._stamps and self._stamps[path] != stamp(path))


def stamp(path: str) -> tuple[int, ...]:
    """What changes when a file does: which it is, its size, and its times; nothing where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Revision:
    """The files of a repository as they were at a revision; what it does not hold, such as installed packages, as it is.

    Attributes:
        top: The repository's folder.
        commit: The revision's hash.
        changed: What differs from it now: files of the revision that were changed or are gone, and new ones, below `top`.
    """

    def __init__(self, folder: str, revision: str, disk: Disk) -> None:
        self._disk = disk
        self.top = _git(
            folder, "rev-parse", "--show-toplevel", wrong=f"--since {revision}: {folder} is in no git repository"
        ).strip()
        self.commit = _commit(self.top, revision)
        told = _git(self.top, "ls-tree", "-r", "-z", self.commit).split("\0")
        modes = {path: about.split()[0] for about, _, path in (line.partition("\t") for line in told if line)}
        self._files = {path for path, mode in modes.items() if mode in ("100644", "100755")}
        self._links = {path for path, mode in modes.items() if mode == "120000"}
        self._targets: dict[str, str] = {}
        self._places: dict[str, str | None] = {}
        changed = _git(self.top, "diff", "--name-only", "--no-renames", "-z", self.commit).split("\0")
        added = _git(self.top, "ls-files", "--others", "--exclude-standard", "-z").split("\0")
        self.changed = frozenset(filter(None, (*changed, *added)))
        self._folders: dict[str, tuple[set[str], set[str]]] = {}
        for path in (*self._files, *self._links):
            while path:
                folder, _, name = path.rpartition("/")
                known = self._folders.setdefault(folder, (set(), set()))
                known[path not in self._files and path not in self._links].add(name)
                path = folder

    def read(self, path: str) -> bytes | None:
        """A file's bytes, as they were."""
        inside = self._inside(path)
        if inside is None:
            return self._disk.read(path)
        if inside not in self._files:
            return None
        if inside in self.changed:
            return self._text(inside).encode(errors="surrogateescape")
        return self._disk.read(os.path.join(self.top, inside))

    def entries(self, folder: str) -> Entries:
        """What lay in a folder."""
        inside = self._inside(folder)
        if inside is None:
            return self._disk.entries(folder)
        files, folders = self._folders.get(inside, (set(), set()))
        linked = {name for name in files if self._resolved(f"{inside}/{name}".lstrip("/")) in self._folders}
        return Entries(frozenset(files - linked), frozenset(folders | linked))

    def hash(self, path: str) -> str:
        """A digest of a file, as it was."""
        inside = self._inside(path)
        if inside is None:
            return self._disk.hash(path)
        if inside in self._files and inside not in self.changed:
            return self._disk.hash(os.path.join(self.top, inside))
        text = self.read(path)
        return "" if text is None else hashlib.sha256(text).hexdigest()

    def _inside(self, path: str) -> str | None:
        """Where a path lies below `top`, through links; None where the revision has no say."""
        if path not in self._places:
            ways = () if is_installed(path) else (path, os.path.realpath(path))  # the repository may be reached through a link
            way = next((each for each in ways if f"{each}/".startswith(f"{self.top}/")), None)
            self._places[path] = None if way is None else self._resolved(way.removeprefix(self.top).lstrip("/"))
        return self._places[path]

    def _resolved(self, path: str) -> str:
        for _ in range(MOST_LINKS):
            link = next((each for each in _prefixes(path) if each in self._links), None)
            if link is None:
                break
            if link not in self._targets:
                self._targets[link] = os.path.normpath(os.path.join(os.path.dirname(link), self._text(link)))
            path = os.path.normpath(self._targets[link] + path.removeprefix(link))
        return path

    def _text(self, path: str) -> str:
        return _git(self.top, "cat-file", "blob", f"{self.commit}:{path}")


def _prefixes(path: str) -> list[str]:
    """`a`, `a/b` and `a/b/c` of `a/b/c`."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _commit(top: str, revision: str) -> str:
    if not revision or revision.startswith("-"):
        raise ValueError(f"--since must be a revision of git, got {revision!r}")
    wrong = f"--since {revision}: {top} has no such revision; a shallow clone lacks those that were not fetched"
    return _git(top, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", wrong=wrong).strip()


def _git(folder: str, *arguments: str, wrong: str = "") -> str:
    """What git says.

    Raises:
        ValueError: If it fails; the message is `wrong`, or git's own.
    """
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, check=True, timeout=120)
    except FileNotFoundError:
        raise ValueError("--since needs git, which is not installed") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise ValueError(wrong or f"git {arguments[0]} in {folder}: {said[-1]}") from None
    return done.stdout.decode(errors="surrogateescape")


@cache
def _installed() -> tuple[str, ...]:
    """Folders of the standard library, and of packages that were installed."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(name) for name in names] + site.getsitepackages() + [site.getusersitepackages()]
    found = dict.fromkeys(each for folder in folders for each in (os.path.abspath(folder), os.path.realpath(folder)))
    return tuple(f"{each}/" for each in found)


def is_installed(path: str) -> bool:
    """Whether a file was installed, and so is told by its package's version."""
    return f"{path}/".startswith(_installed())
