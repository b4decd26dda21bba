"""The digest under which a verdict is kept: of everything that it depends on."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from gaugeblock.conformance.engine.exploration import Profile
from gaugeblock.conformance.engine.implementation import Candidate
from gaugeblock.conformance.engine.kept import circumstances
from gaugeblock.conformance.engine.kept.imports import (
    Dependencies,
    Module,
    Search,
    dependencies,
    local_path,
    package_of_file,
    roots_of_file,
)
from gaugeblock.conformance.engine.kept.trees import Disk, Tree
from gaugeblock.conformance.engine.registry import claims_of, contract_modules
from gaugeblock.conformance.engine.trial import Property, Subject

# Whatever judges is loaded by these. Not so the command, which hands tasks out, reports, benchmarks, and what is planted.
ENGINE = (
    "gaugeblock.conformance.engine.exploration",
    "gaugeblock.conformance.engine.kept.digest",  # what counts here
    "gaugeblock.conformance.engine.properties",
    "gaugeblock.conformance.engine.processes.workers",
    "gaugeblock.conformance.engine.processes.agent",
    "gaugeblock.conformance.engine.processes.nursery",
    "gaugeblock.conformance.engine.processes.process",
)
MOST_FILES = 2000  # of a folder of which every file may matter
SKIPPED = frozenset({"__pycache__", "node_modules"})
NOTHING = Dependencies(frozenset(), frozenset(), frozenset(), frozenset())
NOT_SOURCES = frozenset({"pyvenv.cfg", "CACHEDIR.TAG", "gaugeblock.json"})  # in a folder of packages, a cache, a report


@dataclass(frozen=True)
class Part:
    """Something that a verdict depends on."""

    digest: str | None
    """Of all its files; None if there are too many to look at."""
    files: frozenset[str]
    """Their paths."""
    dependencies: Dependencies
    """What it loads."""


@dataclass
class Digests:
    """Digests of verdicts, from the files of a tree."""

    tree: Tree = field(default_factory=Disk)
    _parts: dict[tuple[object, ...], Part] = field(default_factory=dict)
    _circumstances: dict[tuple[object, ...], str | None] = field(default_factory=dict)

    def of(self, subject: Subject, prop: Property, profile: Profile) -> str | None:
        """The digest of a verdict; None if not all that it depends on can be told."""
        sources = self.sources(subject, prop)
        around = self._around(subject)
        if sources is None or around is None:
            return None
        whose = subject.implementation
        return _digest_of(
            [
                sources, around, whose.contract, whose.name, claims_of(whose), subject.dtype, subject.device, prop.name,
                vars(profile), isinstance(whose.function, Candidate),
            ]
        )  # fmt: skip

    def _around(self, subject: Subject) -> str | None:
        """A digest of the circumstances; None if a package that is used cannot tell its version."""
        implementation = self.implementation(subject)
        loaded = implementation.dependencies if implementation else NOTHING
        key = loaded.elsewhere, loaded.strings, subject.device
        if key not in self._circumstances:
            packages = circumstances.packages(loaded.elsewhere)
            machine = circumstances.machine(subject.device)
            found = [packages, circumstances.variables(loaded.strings), machine]
            self._circumstances[key] = None if packages is None or machine is None else _digest_of(found)
        return self._circumstances[key]

    def sources(self, subject: Subject, prop: Property) -> str | None:
        """The same of the files alone."""
        parts = self.parts(subject, prop)
        digests = [each.digest if each else None for each in parts]
        return None if None in digests else _digest_of(digests)

    def files(self, subject: Subject, prop: Property) -> frozenset[str]:
        """The paths of all files that a verdict depends on."""
        return frozenset().union(*(each.files for each in self.parts(subject, prop) if each))

    def parts(self, subject: Subject, prop: Property) -> tuple[Part | None, ...]:
        """The property with the engine, the contract, the implementation."""
        judge = self.built_in((*ENGINE, prop.check.__module__))
        contract = self.built_in((contract_modules()[subject.contract.name],))
        return judge, contract, self.implementation(subject)

    def implementation(self, subject: Subject) -> Part | None:
        """What an implementation is made of; None of a function that this process alone knows."""
        function = subject.implementation.function
        if isinstance(function, Candidate):
            return self._candidate(function.source)
        if not isinstance(function, str):
            return self.built_in((function.__module__,)) if subject.implementation.kind == "reference" else None
        return self.built_in((function.partition(":")[0],), follow_strings=True)

    def built_in(self, modules: tuple[str, ...], *, follow_strings: bool = False) -> Part:
        """Modules that are built in."""
        if (modules, follow_strings) not in self._parts:
            search = Search(self.tree, ())
            starts = [each for name in modules for each in search.find(name)]
            self._parts[modules, follow_strings] = self._part(dependencies(search, starts, follow_strings=follow_strings))
        return self._parts[modules, follow_strings]

    def _candidate(self, source: str) -> Part:
        if (source,) not in self._parts:
            if source.endswith(".py"):
                path = os.path.abspath(source)
                search = Search(self.tree, roots_of_file(path, self.tree))
                starts = [Module(package_of_file(path, self.tree)[1], path)]
            else:
                search = Search(self.tree, local_path())
                starts = [*search.find(source)]
            found = dependencies(search, starts, follow_strings=True)
            if not starts:
                found = replace(NOTHING, elsewhere=frozenset({source.partition(".")[0]}))
            self._parts[source,] = self._part(found)
        return self._parts[source,]

    def _part(self, found: Dependencies) -> Part:
        """With every file of the folders of which every file may matter."""
        files = set(found.files)
        for folder in found.folders:
            for path in self._below(folder):
                files.add((f"/{os.path.relpath(path, folder)}", path))
                if len(files) > MOST_FILES:
                    return Part(None, frozenset(), found)
        hashes = sorted((name, self.tree.hash(path)) for name, path in files)
        return Part(_digest_of(hashes), frozenset(path for _, path in files), found)

    def _below(self, folder: str) -> Iterable[str]:
        files, folders = self.tree.entries(folder)
        if files & NOT_SOURCES:
            return
        yield from (
            os.path.join(folder, name) for name in files if not name.startswith(".") and not name.endswith((".pyc", ".log"))
        )
        for name in folders - SKIPPED:
            if not name.startswith("."):
                yield from self._below(os.path.join(folder, name))


def _digest_of(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
