"""Every mutant of a module: where its text is changed, what it was and what it becomes."""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from gaugeblock.conformance.selftest.mutants.rules import HINTS, RULES, Replacement, Site

UNTOUCHED_FIELDS = ("annotation", "returns", "decorator_list", "defaults", "kw_defaults", "type_params", "msg")
UNTOUCHED = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.arguments, ast.expr_context, ast.operator, ast.cmpop)
LONGEST = 100  # characters of a change that are shown


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    module: str
    """That is changed, by its import name."""
    number: int
    """Of the change among all of the module."""
    rule: str
    """That made it."""
    function: str
    """In which it stands, `Class.method`; empty for the module itself."""
    line: int
    """Of the file, counted from 1."""
    text: str
    """The line as it stands there."""
    before: str
    after: str
    """The piece that is changed; of a statement that holds others, what it begins with."""

    @property
    def place(self) -> str:
        """File and line, as editors take them."""
        return f"{self.module.removeprefix('gaugeblock.').replace('.', '/')}.py:{self.line}"

    @property
    def change(self) -> str:
        """What becomes of what."""
        return f"{self.before} -> {self.after}"

    def __str__(self) -> str:
        where = f"{self.place} ({self.function})" if self.function else self.place
        return f"{where}, {self.rule}: {shortened(self.before)} -> {shortened(self.after)}   in: {shortened(self.text)}"


@dataclass(frozen=True)
class _Change:
    site: Site
    rule: str
    replacement: Replacement


class Source:
    """A module's text, its tree, and all changes of it."""

    def __init__(self, module: str, text: str) -> None:
        self.module, self.lines, self.tree = module, text.splitlines(), ast.parse(text)
        self.framework = "jax" if "import jax" in text else "torch"
        self.regions: list[range] = []  # of each mutant: the lines of its statement, of which one must be run
        self.mutants: list[Mutant] = []
        self._changes: list[_Change] = []
        seen = set()
        for site in _sites(self.tree, (), self.framework):
            for name, rule in RULES.items():
                for replacement in rule(site):
                    after = self._statement_after(site, replacement)
                    key = id(_statement(site)), after
                    if key not in seen and after != ast.unparse(_statement(site)) and _is_python(after):
                        seen.add(key)
                        self._add(_Change(site, name, replacement))

    def _add(self, change: _Change) -> None:
        site, line = change.site, getattr(change.site.node, "lineno", 0)
        self.regions.append(_region(_statement(site)))
        self._changes.append(change)
        function = ".".join(each.name for each in site.parents if isinstance(each, ast.FunctionDef | ast.ClassDef))
        before, after = _in_one_line(site.node), _in_one_line(change.replacement)
        text = self.lines[line - 1].strip()
        self.mutants.append(Mutant(self.module, len(self.mutants), change.rule, function, line, text, before, after))

    def _statement_after(self, site: Site, replacement: Replacement) -> str:
        statement = _statement(site)
        if statement is site.node:
            return ast.unparse(replacement)
        return _unparsed_with(site, replacement, statement)

    def text_of(self, number: int) -> str:
        """The module's text with one of its changes."""
        change = self._changes[number]
        return _unparsed_with(change.site, change.replacement, self.tree)


def shortened(text: str) -> str:
    """The same, not too long."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def file_of(module: str) -> Path:
    """The file of a module of ours, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    return Path(spec.origin)


@lru_cache(64)
def source_of(module: str) -> Source:
    """All changes of a module."""
    return Source(module, file_of(module).read_text())


def _sites(node: ast.AST, parents: tuple[ast.AST, ...], framework: str) -> Iterator[Site]:
    """Every node that a rule may look at, a statement before its parts."""
    if isinstance(node, UNTOUCHED) or (isinstance(node, ast.keyword) and node.arg in HINTS):
        return
    if isinstance(node, ast.expr | ast.stmt) and parents:
        yield Site(node, parents, framework)
    for name, value in ast.iter_fields(node):
        if name not in UNTOUCHED_FIELDS and not (isinstance(node, ast.If) and _only_raises(value)):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, ast.AST):
                    yield from _sites(each, (*parents, node), framework)


def _in_one_line(node: ast.AST) -> str:
    lines = ast.unparse(node).splitlines()
    return lines[0] if isinstance(node, ast.stmt) else " ".join(each.strip() for each in lines)


def _only_raises(branch: object) -> bool:
    """Whether a branch finds words, and raises."""
    return isinstance(branch, list) and bool(branch) and isinstance(branch[-1], ast.Raise)


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _statement(site: Site) -> ast.stmt:
    return next(each for each in (site.node, *reversed(site.parents)) if isinstance(each, ast.stmt))


def _region(statement: ast.stmt) -> range:
    """The lines of a statement, without those that it holds."""
    body = getattr(statement, "body", None)
    end = body[0].lineno if body else (statement.end_lineno or statement.lineno) + 1
    return range(statement.lineno, max(end, statement.lineno + 1))


def _unparsed_with(site: Site, replacement: Replacement, whole: ast.AST) -> str:
    """The text of a tree in which another node stands for a moment."""
    for name, value in ast.iter_fields(site.parent):
        if value is site.node:
            setattr(site.parent, name, replacement)
            try:
                return ast.unparse(whole)
            finally:
                setattr(site.parent, name, value)
        if isinstance(value, list) and any(each is site.node for each in value):
            place = next(place for place, each in enumerate(value) if each is site.node)
            value[place] = replacement
            try:
                return ast.unparse(whole)
            finally:
                value[place] = site.node
    raise AssertionError("a node that its parent does not hold")
