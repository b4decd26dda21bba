"""`gaugeblock check`: every property on every subject in worker processes; the verdicts shown and written down."""

import argparse
import datetime
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console

from gaugeblock.conformance.engine.budget import shared
from gaugeblock.conformance.engine.devices import cache_compilations, compile_quickly, set_up_process
from gaugeblock.conformance.engine.exploration import PROFILES, examine, verdict_on
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.judging.verdict import FAILED, Failure, Verdict, exit_status
from gaugeblock.conformance.engine.kept.verdicts import KeptVerdicts, open_kept
from gaugeblock.conformance.engine.processes import nursery
from gaugeblock.conformance.engine.processes.workers import Died, get_ready, run_tasks
from gaugeblock.conformance.engine.properties import find_property, properties
from gaugeblock.conformance.engine.selection import Filters, subjects_of
from gaugeblock.conformance.engine.sharding import select_part
from gaugeblock.conformance.engine.suggestion import one_line
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.conformance.exit_status import NOTHING_TESTED
from gaugeblock.conformance.report import files, terminal, waivers
from gaugeblock.conformance.report.environment import capture_environment

Task = tuple[int, str]  # the subject's number and the property's name
RANKS = "ranks"
SLACK_SECONDS = 300.0  # for what no case's time counts: starting processes, shrinking
FIRST_LOSSES = 2  # properties in which a candidate's process was lost, of one that has never answered
MOST_LOSSES = 6  # the same of one that has
MOST_TIMEOUTS = 3  # of those, how many may have been waited for


def run_gate(options: argparse.Namespace) -> int:
    """Judges, prints, writes; returns the exit status.

    Raises:
        ValueError: If the call, a candidate or the waivers file is wrong.
    """
    start = time.monotonic()
    set_up_process()
    cache_compilations()
    compile_quickly()
    environment = capture_environment()
    with closing(open_kept(options, environment["git"])) as kept:  # before any candidate runs, which might write there
        return _run(options, environment, kept, start)


def _run(options: argparse.Namespace, environment: dict[str, Any], kept: KeptVerdicts, start: float) -> int:
    console = Console(highlight=False)
    if options.peers:
        from gaugeblock.conformance.peers import trial

        console.print(trial.told(), markup=False, soft_wrap=True)
        environment["versions"] |= trial.versions()
    filters = Filters(tuple(options.contract), tuple(options.implementation), tuple(options.dtype), tuple(options.device))
    chosen = [find_property(name).name for name in options.property] or list(properties())
    subjects = subjects_of(tuple(options.candidates), filters)
    waived = waivers.load_waivers(options.waivers) if options.waivers else None
    if options.report:
        files.make_folder(options.report)
    if not subjects:
        console.print("nothing was tested: no implementation fits the filters on this machine")
        return NOTHING_TESTED

    tasks = [(number, name) for name in chosen for number in range(len(subjects))]
    everything_quickly = options.profile == "quick" and not (options.candidates or options.dtype)
    reasons = {task: _not_judged(subjects[task[0]][0], task[1], everything_quickly) for task in tasks}
    work = [(subjects[number][0], find_property(name)) for number, name in tasks]
    positions, part = select_part(work, [bool(reasons[task]) for task in tasks], options)
    found: dict[Task, Verdict] = {}
    groups: dict[str, list[Task]] = defaultdict(list)
    losses = Losses()
    tasks = [tasks[position] for position in positions]
    for number, name in sorted(tasks, key=lambda each: each[1] != "gradients"):  # whose budgets serve the others too
        subject, reason = subjects[number][0], reasons[number, name]
        if reason:
            found[number, name] = verdict_on(subject, name, "not supported", reason)
        elif known := kept.find(subject, find_property(name)):
            found[number, name] = known
            losses.count(known)
        else:
            shared = f"{subject.implementation.contract}/{subject.dtype}/{subject.device}"  # cases and budgets
            groups[f"{RANKS}/{subject.device}" if subject.on_ranks else shared].append((number, name))
    for task, verdict in _judged(groups, subjects, options, losses, console):
        found[task] = verdict
        kept.keep(subjects[task[0]][0], find_property(task[1]), verdict)

    verdicts = [found[task] for task in tasks]
    if waived is not None:
        verdicts, remarks = waived.apply(verdicts, datetime.date.today())
        for remark in () if part else remarks:  # what a waiver is for may be in another part
            console.print(remark, style="yellow", markup=False)
    if options.report:
        sources = {(each.implementation.contract, each.implementation.name): source for each, source in subjects}
        environment |= {"part": part.to_json()} if part else {}
        files.write_report(options.report, verdicts, environment, options.profile, sources)
    if verdicts or not part:
        terminal.print_matrix(verdicts, console, time.monotonic() - start, options.report, verbose=options.verbose)
    if part:
        console.print(part.told, markup=False, soft_wrap=True)
    if options.report:
        console.print(f"report: {options.report / 'index.html'}", markup=False, soft_wrap=True)
    if options.peers:
        return _of_peers(options, verdicts, environment, console)
    return part.exit_status(verdicts) if part else exit_status(verdicts)


def _of_peers(options: argparse.Namespace, verdicts: Sequence[Verdict], environment: dict[str, Any], console: Console) -> int:
    """What a trial of peers ends with: their failures are told, and are not ours."""
    from gaugeblock.conformance.peers import trial

    if options.markdown:
        trial.update(options.markdown, verdicts, environment["time"][:10])
    if any(each.status in FAILED - {"error"} for each in verdicts):
        console.print(trial.OTHERS)
    return trial.status_of(verdicts)


def _not_judged(subject: Subject, name: str, everything_quickly: bool) -> str:
    """Why a property is not tested for a subject, or an empty string."""
    prop, first = find_property(name), subject.implementation.dtypes[0]
    if everything_quickly and subject.dtype != first and not prop.every_dtype:
        return f"built in: judged in {first} alone, unless --dtype or --profile asks for more"
    return prop.inapplicable(subject)


def _judged(
    groups: dict[str, list[Task]],
    subjects: Sequence[tuple[Subject, str | None]],
    options: argparse.Namespace,
    losses: "Losses",
    console: Console,
) -> Iterator[tuple[Task, Verdict]]:
    """Every task in a worker, with its verdict, as they come."""
    if not groups:
        return
    get_ready(__name__)
    profile = PROFILES[options.profile]
    workers = len(os.sched_getaffinity(0)) if options.workers is None else max(1, options.workers)
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.gettempdir())  # nothing is left in the user's folder
    twice = _in_two_groups(groups, subjects)
    with terminal.progress(sum(map(len, groups.values())), console) as progress, _store(twice) as store:
        arguments = (subjects, profile.name, nursery.start(), store, twice)
        alone = [name for name in groups if name.startswith(RANKS)]  # one worker leads the ranks, so that they start once
        waiting = dict(sorted(groups.items(), key=lambda group: (group[0] not in alone, _cases(subjects, group[1]))))
        seconds = 2 * profile.verdict_seconds + SLACK_SECONDS
        known = partial(_known, subjects, losses)
        for task, result in run_tasks(waiting, prepare, arguments, workers=workers, seconds=seconds, alone=alone, known=known):
            subject = subjects[task[0]][0]
            verdict = _no_answer(subject, task[1], result, seconds) if isinstance(result, Died) else result
            losses.count(verdict)
            progress.advance(verdict)
            yield task, verdict


def _in_two_groups(groups: dict[str, list[Task]], subjects: Sequence[tuple[Subject, str | None]]) -> frozenset[str]:
    """The contracts that two workers judge, one of them over ranks."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for number, _ in (task for tasks in groups.values() for task in tasks):
        subject = subjects[number][0]
        found[subject.on_ranks].add(subject.implementation.contract)
    return frozenset(found[True] & found[False])


@contextmanager
def _store(contracts: frozenset[str]) -> Iterator[shared.Store]:
    """Where workers keep what each of them needs; a process of its own, which a candidate cannot reach."""
    if not contracts:
        yield {}
        return
    with multiprocessing.get_context("forkserver").Manager() as manager:
        yield manager.dict()


def prepare(
    subjects: Sequence[tuple[Subject, str | None]],
    profile: str,
    candidates_from: str,
    store: shared.Store,
    contracts: frozenset[str],
) -> Callable[[Task], Verdict]:
    """Sets a worker process up; the returned function judges one task."""
    nursery.share(candidates_from)
    shared.share(store, contracts)
    set_up_process()
    warnings.filterwarnings("ignore", module="triton")  # its interpreter tells of NaN and infinity that cases hold on purpose
    warnings.filterwarnings("ignore", message="invalid value encountered in reduce")  # so does numpy under it

    def judge(task: Task) -> Verdict:
        subject, source = subjects[task[0]]
        start = time.monotonic()
        try:
            return examine(subject, properties()[task[1]], PROFILES[profile], source)
        except Exception as error:  # the engine's, the contract's or the reference's: candidates run elsewhere
            reason = f"{type(error).__name__}: {one_line(error)}"
            verdict = verdict_on(subject, task[1], "error", reason, time.monotonic() - start)
            return replace(verdict, failure=Failure(reason, details=(traceback.format_exc(),)))

    return judge


class Losses:
    """Which candidates lost their process so often that the rest of their verdicts is known without trying."""

    def __init__(self) -> None:
        self.lost: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
        self.answered: set[tuple[str, str]] = set()

    def count(self, verdict: Verdict) -> None:
        """Takes note of a verdict that was tried."""
        name = verdict.contract, verdict.implementation
        if verdict.status in ("crash", "timeout"):
            self.lost[name].append(verdict)
        elif verdict.cases:
            self.answered.add(name)

    def hopeless(self, implementation: Implementation) -> list[Verdict]:
        """What became of it in those properties that speak for the rest; empty if there is hope."""
        name = implementation.contract, implementation.name
        lost = self.lost[name]
        late = sum(each.status == "timeout" for each in lost)
        enough = len(lost) >= MOST_LOSSES or late >= MOST_TIMEOUTS or (len(lost) >= FIRST_LOSSES and name not in self.answered)
        return lost if enough else []


def _known(subjects: Sequence[tuple[Subject, str | None]], losses: Losses, task: Task) -> Verdict | None:
    subject = subjects[task[0]][0]
    lost = losses.hopeless(subject.implementation)
    if not lost or find_property(task[1]).inapplicable(subject):
        return None
    tried = ", ".join(dict.fromkeys(each.property for each in lost))
    return verdict_on(subject, task[1], lost[-1].status, f"not tried again after {tried}: {lost[-1].reason}")


def _cases(subjects: Sequence[tuple[Subject, str | None]], tasks: list[Task]) -> tuple[float, int]:
    """By what groups are begun: those whose cases are dear, and so few, then the large ones."""
    return subjects[tasks[0][0]][0].contract.cases, -len(tasks)


def _no_answer(subject: Subject, name: str, died: Died, seconds: float) -> Verdict:
    code = died.exit_code or 0
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    reason = f"the judge had no verdict within {seconds:.0f} s" if died.late else f"the judge's process died ({how})"
    return verdict_on(subject, name, "error", reason, died.seconds)
