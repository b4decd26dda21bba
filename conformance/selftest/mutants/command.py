"""`gaugeblock selftest --mutants`: every mutant of the sources that contracts run through, judged until one property fails.

A mutant is judged under one contract: the smallest whose cases run its line, so that a helper is judged with what it helps. One
that survives there is judged under the others that run it.
"""

import argparse
import os
import random
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gaugeblock.conformance.engine.devices import cache_compilations, compile_quickly, set_up_process
from gaugeblock.conformance.engine.processes import nursery, seats
from gaugeblock.conformance.engine.processes.workers import Died, run_tasks
from gaugeblock.conformance.engine.registry import contracts, find_contract
from gaugeblock.conformance.engine.suggestion import one_line
from gaugeblock.conformance.exit_status import CONFORM, FAILS, NOTHING_TESTED
from gaugeblock.conformance.selftest.mutants import table
from gaugeblock.conformance.selftest.mutants.equivalents import Equivalent, load_equivalents, stale, wrong
from gaugeblock.conformance.selftest.mutants.judging import Outcome, judge, judge_elsewhere
from gaugeblock.conformance.selftest.mutants.sources import Mutant
from gaugeblock.conformance.selftest.mutants.tracing import mutants_of, rows_of, trace

FEWEST = 60  # mutants of a contract, shared ones among them
MUTANT_SECONDS = 900  # a survivor goes through every property in two dtypes
RECYCLED = 100  # mutants after which candidates' processes start anew, without what those have left
Planned = list[tuple[Mutant, str]]  # with the implementation that runs its line
Task = tuple[Any, ...]


def run_mutants(options: argparse.Namespace) -> int:
    """Judges mutants, prints the table, and writes the outcomes to the file that they name; 0 if what survives is what is listed.

    Args:
        options: `mutants`: a contract's name, or "all"; `sample`: how many of each contract, or None; `workers`: how many
            processes, or None; `json`: a path or None.
    """
    start, console = time.monotonic(), Console(highlight=False)
    names = list(contracts()) if options.mutants == "all" else [find_contract(options.mutants).name]
    listed = load_equivalents()
    run = Workers(console, options.workers or len(os.sched_getaffinity(0)))
    planned = shared_out(run.trace(names))
    if options.sample is not None:
        planned = {name: sampled(mutants, options.sample) for name, mutants in planned.items()}
    outcomes = [*run.judge((name, *each) for name, mutants in planned.items() for each in mutants).values()]
    outcomes = second_chance(outcomes, listed, run)
    remarks = [*stale(listed), *wrong(listed, outcomes)]
    table.print_outcomes(outcomes, listed, remarks, time.monotonic() - start, console)
    if options.json:
        table.write_json(options.json, outcomes, listed, remarks)
    if not outcomes:
        return NOTHING_TESTED
    return FAILS if remarks or table.survivors(outcomes, listed) else CONFORM


def shared_out(found: Mapping[str, Planned]) -> dict[str, Planned]:
    """Each mutant under the smallest contract that runs it; under one that has few, others' too."""
    taken: set[Mutant] = set()
    planned: dict[str, Planned] = {name: [] for name in found}
    for name in sorted(found, key=lambda each: len(found[each])):
        own = [each for each in found[name] if each[0] not in taken]
        others = [each for each in found[name] if each[0] in taken]
        planned[name] = own + sampled(others, max(0, FEWEST - len(own)))
        taken |= {mutant for mutant, _ in own}
    return planned


def sampled(mutants: Planned, count: int) -> Planned:
    """So many of them, always the same, of as many rules and implementations as can be."""
    strata: dict[tuple[str, str], Planned] = defaultdict(list)
    for each in mutants:
        strata[each[0].rule, each[1]].append(each)
    draw = random.Random(0)
    piles = [draw.sample(each, len(each)) for each in strata.values()]
    draw.shuffle(piles)
    dealt = [pile[turn] for turn in range(max(map(len, piles), default=0)) for pile in piles if turn < len(pile)]
    return dealt[:count]


def second_chance(outcomes: list[Outcome], listed: Iterable[Equivalent], run: "Workers") -> list[Outcome]:
    """Survivors that are not listed, judged under all else that runs them, if they have not died there."""
    killed = {each.mutant: each for each in outcomes if each.killed_by}
    outcomes = [killed.get(each.mutant, each) for each in outcomes]
    again = run.judge_elsewhere(each for each in table.survivors(outcomes, listed) if not each.unsound)
    return [again.get(each, each) for each in outcomes]


class Workers:
    """Worker processes that trace and judge, with a bar that shows how far they are."""

    def __init__(self, console: Console, count: int) -> None:
        self.console, self.count = console, count
        os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.gettempdir())  # nothing is left in the user's folder
        cache_compilations()
        compile_quickly()

    def trace(self, names: Iterable[str]) -> dict[str, Planned]:
        """The mutants that each contract runs through."""
        found = self._run("tracing", {name: [("trace", name)] for name in names})
        for (_, name), result in found:
            if isinstance(result, Died):
                raise RuntimeError(f"a worker process died while it traced {name}: exit code {result.exit_code}")
        return {task[1]: result for task, result in found}

    def judge(self, tasks: Iterable[tuple[str, Mutant, str]]) -> dict[Outcome, Outcome]:
        """What comes of mutants, each with its contract and the implementation that runs it."""
        groups: dict[str, list[Task]] = defaultdict(list)
        for contract, mutant, implementation in tasks:
            groups[f"{contract}/{implementation}"].append(("judge", Outcome(mutant, contract, implementation)))
        return self._outcomes("judging", groups)

    def judge_elsewhere(self, survivors: Iterable[Outcome]) -> dict[Outcome, Outcome]:
        """What comes of survivors under all else that runs them."""
        groups: dict[str, list[Task]] = defaultdict(list)
        for each in survivors:
            groups[each.mutant.module].append(("elsewhere", each))
        return self._outcomes("judging survivors elsewhere", groups)

    def _outcomes(self, title: str, groups: Mapping[str, list[Task]]) -> dict[Outcome, Outcome]:
        found = self._run(title, groups)
        return {task[1]: _no_answer(task[1], result) if isinstance(result, Died) else result for task, result in found}

    def _run(self, title: str, groups: Mapping[str, list[Task]]) -> list[tuple[Task, Any]]:
        if not any(groups.values()):
            return []
        columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        ordered = dict(sorted(groups.items(), key=lambda group: -len(group[1])))
        with Progress(*columns, console=self.console, transient=True) as progress:
            bar, results = progress.add_task(title, total=sum(map(len, groups.values()))), []
            arguments = (nursery.start(),)
            for each in run_tasks(ordered, prepare, arguments, workers=self.count, seconds=MUTANT_SECONDS):
                results.append(each)
                progress.advance(bar)
        return results


def prepare(candidates_from: str) -> Callable[[Task], Any]:
    """Sets a worker process up; the returned function traces one contract, or judges one mutant."""
    nursery.share(candidates_from)
    set_up_process()
    warnings.filterwarnings("ignore", module="triton")  # its interpreter tells of NaN and infinity that cases hold on purpose
    warnings.filterwarnings("ignore", message="invalid value encountered in reduce")  # so does numpy under it
    judged = 0

    def run(task: Task) -> Any:
        nonlocal judged
        match task:
            case ("trace", name):
                contract = find_contract(name)
                runs = [trace(contract, each) for each in rows_of(contract)]
                return [(mutant, run.implementation.name) for mutant, run in mutants_of(runs)]
            case (kind, before):
                judged += 1
                if judged % RECYCLED == 0:
                    seats.stop_all()
                try:
                    again = kind == "elsewhere"
                    return judge_elsewhere(before) if again else judge(before.contract, before.implementation, before.mutant)
                except Exception as error:  # the engine's
                    return replace(before, unsound=f"{type(error).__name__}: {one_line(error)}")

    return run


def _no_answer(before: Outcome, died: Died) -> Outcome:
    reason = f"no verdict within {died.seconds:.0f} s" if died.late else f"the judge's process died ({died.exit_code})"
    return replace(before, unsound=reason, seconds=before.seconds + died.seconds)
