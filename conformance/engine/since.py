"""What a change since a revision of git can have touched: verdicts some source of which was another one then."""

import os
import re
from collections.abc import Sequence

from gaugeblock.conformance.engine.kept.digest import Digests
from gaugeblock.conformance.engine.kept.imports import own_folder
from gaugeblock.conformance.engine.kept.trees import Disk, Revision, is_installed
from gaugeblock.conformance.engine.trial import Property, Subject

# Files that say which packages are installed: where one has changed, anything may have.
PINS = re.compile(
    r"pyproject\.toml|setup\.(py|cfg)|(.*-)?(requirements|constraints).*\.(txt|in)|.*\.lock|.*\.lockb?|Pipfile|(conda-)?environment.*\.ya?ml"
)


class Since:
    """A revision beside the files as they are.

    Args:
        revision: As git knows it.
        sources: Files and modules of candidates; none for what is built in.

    Raises:
        ValueError: If there is no such revision, or not all sources are in its repository.
    """

    def __init__(self, revision: str, sources: Sequence[str]) -> None:
        files = [os.path.abspath(each) for each in sources if each.endswith(".py")]
        folder = os.path.dirname(files[0]) if files else os.getcwd() if sources else own_folder()
        if not sources and is_installed(folder):
            raise ValueError(f"--since {revision}: what is built in was installed, and is in no repository; name candidates")
        disk = Disk()
        tree = Revision(folder, revision, disk)
        self.revision, self.commit = revision, tree.commit
        outside = [each for each in files if not f"{os.path.realpath(each)}".startswith(f"{tree.top}/")]
        if outside:
            raise ValueError(f"--since {revision}: {outside[0]} is not in the repository {tree.top}")
        self.pins = sorted(each for each in tree.changed if PINS.fullmatch(os.path.basename(each)))
        self._now, self._then = Digests(disk), Digests(tree)

    def touches(self, subject: Subject, prop: Property) -> bool:
        """Whether a verdict may be another one than it was then."""
        now = self._now.sources(subject, prop)
        return bool(self.pins) or now is None or now != self._then.sources(subject, prop)
