"""Which lines of our sources a contract's cases run through, and so which of their mutants are worth judging."""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.inputs.coverage import array
from gaugeblock.conformance.engine.judging.violation import Violation
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import builtin_implementations, load
from gaugeblock.conformance.engine.trial import Subject, Trial
from gaugeblock.conformance.selftest.mutants.copies import GENUINE, MUTABLE, reached
from gaugeblock.conformance.selftest.mutants.sources import Mutant, file_of, source_of

COVERING = 3  # cases besides the landmarks
Lines = dict[str, set[int]]  # by module


@dataclass(frozen=True)
class Run:
    """An implementation of ours, and the lines that its cases run through."""

    implementation: Implementation
    lines: Lines

    @property
    def entry(self) -> str:
        """Where it is imported from."""
        return entry_of(self.implementation)


def entry_of(implementation: Implementation) -> str:
    """The import path of an implementation of ours."""
    function: Any = implementation.function
    return function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"


def module_of(implementation: Implementation) -> str:
    """The module that holds it."""
    return entry_of(implementation).partition(":")[0]


def rows_of(contract: Contract) -> list[Implementation]:
    """The implementations whose sources are mutated: the references and what of ours a CPU runs in this process.

    A reference is judged in every dtype of its contract, the JAX twin too. Of ranks, each a process, no lines are seen.
    """
    rows = [each for each in builtin_implementations(contract) if "cpu" in each.devices and not each.world_sizes]
    return [
        replace(each, dtypes=contract.dtypes) if each.kind == "reference" else each  # type: ignore[arg-type]
        for each in rows
    ]


def trace(contract: Contract, implementation: Implementation) -> Run:
    """Runs some of a contract's cases, and its bad calls, and takes note of every line of ours."""
    here = replace(implementation, function=load(implementation))
    subject, compiled = Subject(here, here.dtypes[0], "cpu"), here.framework == "jax"
    if compiled:
        import jax

        jax.clear_caches()  # a function that was compiled before is not run
    with _noted(reached(module_of(implementation))) as lines:
        for case in _cases(contract, compiled=compiled):
            trial = Trial(subject, case)
            trial.run(gradients=here.differentiable and contract.regime(case.regime).differentiable)
        with suppress(Violation):
            properties()["rejections"].check(Trial(subject, _cases(contract)[0]))
    return Run(implementation, lines)


def mutants_of(runs: Iterable[Run]) -> list[tuple[Mutant, Run]]:
    """Every mutant of a line that is run, each with the first implementation that runs it."""
    found: dict[tuple[str, int], tuple[Mutant, Run]] = {}
    runs = list(runs)
    for run in runs:
        names = _names_in(run.lines)
        for module, lines in run.lines.items():
            source = source_of(module)
            for mutant, region in zip(source.mutants, source.regions, strict=True):
                is_run = not lines.isdisjoint(region) or (not mutant.function and _is_used(source.tree, mutant.line, names))
                if is_run:
                    found.setdefault((module, mutant.number), (mutant, run))
    return list(found.values())


def _cases(contract: Contract, *, compiled: bool = False) -> tuple[Case, ...]:
    """Landmarks, cases that cover, one of each other regime; of what is compiled anew for each, two landmarks."""
    covering = array(contract, 2)[: len(contract.landmarks) + COVERING]
    if compiled:
        return covering[: min(2, len(contract.landmarks))]
    first = covering[0]
    others = (first.replace(regime=each.name) for each in contract.regimes[1:])
    return (*covering, *others)


@contextmanager
def _noted(modules: Iterable[str]) -> Iterator[Lines]:
    """Lines of some modules that are run in this thread meanwhile."""
    lines: Lines = defaultdict(set)
    files = {str(file_of(each)): each for each in modules if each.startswith(MUTABLE) and each != GENUINE}

    def begin(frame: Any, event: str, argument: Any) -> Any:
        module = files.get(frame.f_code.co_filename)
        if module is None:
            return None
        seen = lines[module]

        def note(frame: Any, event: str, argument: Any) -> Any:
            if event == "line":
                seen.add(frame.f_lineno)
            return note

        return note

    before = sys.gettrace()
    sys.settrace(begin)
    try:
        yield lines
    finally:
        sys.settrace(before)


def _names_in(lines: Lines) -> set[str]:
    """Names that are used in lines that are run."""
    return {
        str(getattr(node, "id", None) or getattr(node, "attr", ""))
        for module, numbers in lines.items()
        for node in ast.walk(source_of(module).tree)
        if isinstance(node, ast.Name | ast.Attribute) and node.lineno in numbers and isinstance(node.ctx, ast.Load)
    }


def _is_used(tree: ast.Module, line: int, names: set[str]) -> bool:
    """Whether a statement of the module itself gives a value to one of the names."""
    inside = (each for each in tree.body if each.lineno <= line <= (each.end_lineno or line))
    statement = next(inside, None)
    match statement:
        case ast.Assign(targets):
            return any(isinstance(each, ast.Name) and each.id in names for each in targets)
        case ast.AnnAssign(ast.Name(name)):
            return name in names
    return False
