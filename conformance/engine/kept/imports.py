"""What a module loads, read from its text: nothing needs to be imported to know that nothing has changed.

What the text does not tell (a name that is put together, a library opened by ctypes, a file that is read) is made good for by
looking at more: at every file of the folder.
"""

import ast
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import gaugeblock
from gaugeblock.conformance.engine.kept.trees import Tree, is_installed

# Modules that load what no import statement names, and names of what does, or reads a file.
LOADERS = frozenset("ctypes cffi importlib imp runpy pkgutil zipimport subprocess".split())
READERS = frozenset(
    """open read_text read_bytes fromfile memmap loadtxt genfromtxt safe_open load_file load_library load_inline cpp_extension
    popen system urlopen __import__ __path__ __loader__""".split()
)
BUILT_IN_READERS = frozenset({"exec", "eval"})  # as methods they are something else
LOAD_FROM = frozenset("np numpy torch pickle joblib json yaml".split())  # whose `load` reads a file; Triton's does not
OF_SYS = frozenset("path modules meta_path path_hooks".split())
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
LONGEST_NAME = 200  # characters of a string that may be a file's name
OWN = "gaugeblock"
IGNORED = (".py", ".pyc", ".pyo", ".pyi", ".md", ".rst", ".log")  # beside a module; what it imports is found by its name


@dataclass(frozen=True)
class Told:
    """What a module's text tells."""

    imports: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    """Names as written, with the number of dots before them and what is imported from them."""
    strings: frozenset[str] = frozenset()
    """Its constants."""
    hides: bool = False
    """Whether it loads or reads what only running it tells."""


@lru_cache(4096)
def told(text: bytes) -> Told:
    """What a module's text tells; of what is not Python, that it hides something."""
    try:
        nodes = list(_executed(ast.parse(text)))
    except (SyntaxError, ValueError):
        return Told(hides=True)
    imports: list[tuple[str, int, tuple[str, ...]]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            imports += [(alias.name, 0, ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.module or "", node.level, tuple(alias.name for alias in node.names)))
    strings = frozenset(each.value for each in nodes if isinstance(each, ast.Constant) and isinstance(each.value, str))
    loaded = {name.partition(".")[0] for name, level, _ in imports if not level}
    return Told(tuple(imports), strings, bool(loaded & LOADERS) or any(map(_hides, nodes)))


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers read."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in (getattr(node.test, "id", ""), getattr(node.test, "attr", "")):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _hides(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in READERS | BUILT_IN_READERS
    if isinstance(node, ast.ImportFrom):
        return any(alias.name in READERS for alias in node.names)
    if not isinstance(node, ast.Attribute):
        return False
    owner = getattr(node.value, "id", "")
    return node.attr in READERS or (node.attr == "load" and owner in LOAD_FROM) or (owner == "sys" and node.attr in OF_SYS)


@dataclass(frozen=True)
class Module:
    """A module's file; of a package, that of its `__init__`; of a namespace, no file but its folder."""

    name: str
    path: str
    folder: str = ""  # in which its submodules lie

    @property
    def is_source(self) -> bool:
        """Whether its text can be read."""
        return self.path.endswith(".py")

    @property
    def is_ours(self) -> bool:
        """Whether it belongs to this package, which hides nothing and reads nothing."""
        return f"{self.name}.".startswith(f"{OWN}.")


class Search:
    """Finds modules as Python would, along a path; those that were installed are not looked into."""

    def __init__(self, tree: Tree, roots: Iterable[str]) -> None:
        self.tree, self.roots = tree, tuple(roots)
        self._found: dict[str, tuple[Module, ...]] = {}

    def find(self, name: str) -> tuple[Module, ...]:
        """The modules that are run when `name` is imported, as far as they exist; none if it was installed."""
        if name not in self._found:
            parent, _, own = name.rpartition(".")
            if not parent:
                first = self._top(own)
                self._found[name] = (first,) if first else ()
            else:
                above = self.find(parent)
                complete = above and above[-1].name == parent and above[-1].folder
                below = self._in(above[-1].folder, own, name) if complete else None
                self._found[name] = (*above, below) if below else above
        return self._found[name]

    def submodules(self, module: Module) -> list[str]:
        """Names of what lies in a package."""
        files = self.tree.entries(module.folder).files if module.folder else ()
        return [f"{module.name}.{name.partition('.')[0]}" for name in files if name.endswith((".py", *_SUFFIXES))]

    def _top(self, name: str) -> Module | None:
        if name == OWN:
            return self._in(os.path.dirname(own_folder()), name, name)
        found = [each for root in self.roots if (each := self._in(root, name, name))]
        regular = next((each for each in found if each.path), None)
        if regular or name in sys.stdlib_module_names:
            return regular
        elsewhere = location(name)
        if elsewhere and is_installed(elsewhere):
            return None
        if os.path.isdir(elsewhere):  # where only an import hook finds it, as an editable installation has one
            initial = os.path.join(elsewhere, "__init__.py")
            return Module(name, initial if "__init__.py" in self.tree.entries(elsewhere).files else "", elsewhere)
        if elsewhere:
            return Module(name, elsewhere)
        return found[0] if found else None  # a namespace package, which any other comes before

    def _in(self, folder: str, own: str, name: str) -> Module | None:
        files, folders = self.tree.entries(folder)
        below = os.path.join(folder, own)
        if own in folders and "__init__.py" in self.tree.entries(below).files:
            return Module(name, os.path.join(below, "__init__.py"), below)
        for suffix in (*_SUFFIXES, ".py"):
            if own + suffix in files:
                return Module(name, below + suffix)
        return Module(name, "", below) if own in folders else None


_SUFFIXES = tuple(importlib.machinery.EXTENSION_SUFFIXES)


@cache
def own_folder() -> str:
    """The folder of this package."""
    return os.path.abspath(gaugeblock.__path__[0])


@cache
def location(name: str) -> str:
    """The folder or file of a top-level module that is not on the way; an empty string where there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ""
    if spec is None:
        return ""
    folders = list(spec.submodule_search_locations or ())
    return os.path.abspath(folders[0] if folders else spec.origin or "")


def local_path() -> tuple[str, ...]:
    """Where Python looks for modules, but for where packages are installed."""
    folders = [os.path.abspath(each or os.getcwd()) for each in sys.path]
    return tuple(dict.fromkeys(each for each in folders if not is_installed(each) and not each.endswith(".zip")))


def roots_of_file(path: str, tree: Tree) -> tuple[str, ...]:
    """Where the imports of a file that is run as a candidate are looked for: first of all beside it."""
    return tuple(dict.fromkeys((os.path.dirname(path), package_of_file(path, tree)[0], *local_path())))


def package_of_file(path: str, tree: Tree) -> tuple[str, str]:
    """The folder that a file's package lies in, and the file's name as a module; without a package, that of the file alone."""
    folder, names = os.path.dirname(path), [Path(path).stem]
    while "__init__.py" in tree.entries(folder).files and Path(folder).name.isidentifier():
        names.insert(0, Path(folder).name)
        folder = os.path.dirname(folder)
    return folder, ".".join(names)


@dataclass(frozen=True)
class Dependencies:
    """All that modules load, as far as it can be told."""

    files: frozenset[tuple[str, str]]
    """Each with a name that is the same on every machine."""
    elsewhere: frozenset[str]
    """Top-level modules that were installed, belong to Python, or are missing."""
    strings: frozenset[str]
    """Constants of what is not ours: among them are the names of environment variables."""
    folders: frozenset[str]
    """Folders of which every file may matter."""


def dependencies(search: Search, starts: Iterable[Module], *, follow_strings: bool) -> Dependencies:
    """All that the modules load, and all that these load.

    Args:
        follow_strings: Whether `package.module:attribute` in a string is loaded too. The rows of a contract name what claims
            to fulfil it, which the contract does not depend on.
    """
    files, elsewhere, strings, folders = set[tuple[str, str]](), set[str](), set[str](), set[str]()
    waiting, seen = [*starts], set[str]()
    while waiting:
        module = waiting.pop()
        if module.path in seen or not module.path:
            continue
        seen.add(module.path)
        files.add((module.name + Path(module.path).suffix, module.path))
        text = told(search.tree.read(module.path) or b"") if module.is_source else Told()
        for name in _imported(module, text):
            found = search.find(name.removesuffix(".*"))
            waiting += found
            if not found:
                elsewhere.add(name.partition(".")[0])
            elif name.endswith(".*"):
                waiting += [each for below in search.submodules(found[-1]) for each in search.find(below)]
        if follow_strings:
            waiting += [each for name in _import_paths(text) for each in search.find(name)]
            elsewhere |= {top for name in _import_paths(text) if is_installed(location(top := name.partition(".")[0]))}
        if not module.is_ours:
            strings |= text.strings
            files |= _beside(search.tree, module) | _named(search.tree, module, text)
            if text.hides:
                folders.add(_home(search.tree, module))
    return Dependencies(frozenset(files), frozenset(elsewhere), frozenset(strings), frozenset(folders))


def _imported(module: Module, text: Told) -> Iterator[str]:
    """Absolute names; `package.*` where all of it is asked for."""
    package = module.name if module.folder else module.name.rpartition(".")[0]
    for name, level, wanted in text.imports:
        if level:
            parts = package.split(".") if package else []
            base = ".".join(parts[: len(parts) - level + 1])
            name = ".".join(filter(None, (base, name)))
        if name:
            yield name
            yield from (f"{name}.{each}" for each in wanted)


def _import_paths(text: Told) -> list[str]:
    return [each.partition(":")[0] for each in text.strings if IMPORT_PATH.fullmatch(each)]


def _beside(tree: Tree, module: Module) -> set[tuple[str, str]]:
    """Data and libraries beside a module, which it may load."""
    folder = os.path.dirname(module.path)
    package = module.name if module.folder else module.name.rpartition(".")[0]
    names = [each for each in tree.entries(folder).files if not each.endswith(IGNORED) and not each.startswith(".")]
    return {(f"{package}:{name}", os.path.join(folder, name)) for name in names}


def _named(tree: Tree, module: Module, text: Told) -> set[tuple[str, str]]:
    """Files whose names are among a module's strings."""
    found = set()
    for string in text.strings:
        if len(string) <= LONGEST_NAME and re.fullmatch(r"[^\n\0]*[./][^\n\0]*", string):
            for base in (os.path.dirname(module.path), os.getcwd()):
                path = os.path.normpath(os.path.join(base, string))
                if os.path.basename(path) in tree.entries(os.path.dirname(path)).files:
                    found.add((f"{module.name}:{string}", path))
    return found


def _home(tree: Tree, module: Module) -> str:
    """The folder that a module's neighbours lie in: of a package, that of all of it."""
    base, name = package_of_file(module.path, tree)
    return os.path.join(base, name.partition(".")[0]) if "." in name else base
