"""`gaugeblock check`: every property on every subject in worker processes; the verdicts shown and written down."""

import argparse
import datetime
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console

from gaugeblock.conformance.engine.devices import cache_compilations, compile_quickly, set_up_process
from gaugeblock.conformance.engine.exploration import PROFILES, examine, verdict_on
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.judging.verdict import FAILED, Failure, Verdict
from gaugeblock.conformance.engine.processes import nursery
from gaugeblock.conformance.engine.processes.workers import Died, run_tasks
from gaugeblock.conformance.engine.properties import find_property, properties
from gaugeblock.conformance.engine.selection import Filters, subjects_of
from gaugeblock.conformance.engine.suggestion import one_line
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.conformance.exit_status import CONFORM, FAILS, NOTHING_TESTED, WRONG_CALL
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
    console = Console(highlight=False)
    set_up_process()
    filters = Filters(tuple(options.contract), tuple(options.implementation), tuple(options.dtype), tuple(options.device))
    chosen = [find_property(name).name for name in options.property] or list(properties())
    subjects = subjects_of(tuple(options.candidates), filters)
    waived = waivers.load_waivers(options.waivers) if options.waivers else None
    if options.report:
        files.make_folder(options.report)
    if not subjects:
        console.print("nothing was tested: no implementation fits the filters on this machine")
        return NOTHING_TESTED

    found: dict[Task, Verdict] = {}
    groups: dict[str, list[Task]] = defaultdict(list)
    everything_quickly = options.profile == "quick" and not (options.candidates or options.dtype)
    for number, (subject, _) in enumerate(subjects):
        shared = f"{subject.implementation.contract}/{subject.dtype}/{subject.device}"  # cases and budgets
        for name in sorted(chosen, key=lambda each: each != "gradients"):  # whose budgets serve the others too
            first = subject.implementation.dtypes[0]
            if everything_quickly and subject.dtype != first and not find_property(name).every_dtype:
                reason = f"built in: judged in {first} alone, unless --dtype or --profile asks for more"
                found[number, name] = verdict_on(subject, name, "not supported", reason)
            else:
                groups[f"{RANKS}/{subject.device}" if subject.on_ranks else shared].append((number, name))
    profile = PROFILES[options.profile]
    workers = len(os.sched_getaffinity(0)) if options.workers is None else max(1, options.workers)
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.gettempdir())  # nothing is left in the user's folder
    cache_compilations()
    compile_quickly()
    with terminal.progress(sum(map(len, groups.values())), console) as progress:
        arguments = (subjects, profile.name, nursery.start())
        losses = Losses()
        alone = [name for name in groups if name.startswith(RANKS)]  # one worker leads the ranks, so that they start once
        waiting = dict(sorted(groups.items(), key=lambda group: (group[0] not in alone, _cases(subjects, group[1]))))
        seconds = 2 * profile.verdict_seconds + SLACK_SECONDS
        known = partial(_known, subjects, losses)
        for task, result in run_tasks(waiting, prepare, arguments, workers=workers, seconds=seconds, alone=alone, known=known):
            subject = subjects[task[0]][0]
            found[task] = _no_answer(subject, task[1], result, seconds) if isinstance(result, Died) else result
            losses.count(found[task])
            progress.advance(found[task])

    verdicts = [found[number, name] for name in chosen for number in range(len(subjects))]
    if waived is not None:
        verdicts, remarks = waived.apply(verdicts, datetime.date.today())
        for remark in remarks:
            console.print(remark, style="yellow", markup=False)
    if options.report:
        sources = {(each.implementation.contract, each.implementation.name): source for each, source in subjects}
        files.write_report(options.report, verdicts, capture_environment(), profile.name, sources)
    terminal.print_matrix(verdicts, console, time.monotonic() - start, options.report)
    if options.report:
        console.print(f"report: {options.report / 'index.html'}")
    return exit_status(verdicts)


def prepare(subjects: Sequence[tuple[Subject, str | None]], profile: str, candidates_from: str) -> Callable[[Task], Verdict]:
    """Sets a worker process up; the returned function judges one task."""
    nursery.share(candidates_from)
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


def exit_status(verdicts: list[Verdict]) -> int:
    """0 all conform, 1 something fails, 2 the engine could not judge something, 3 nothing was tested."""
    if any(each.status == "error" for each in verdicts):
        return WRONG_CALL
    if any(each.status in FAILED for each in verdicts):
        return FAILS
    return CONFORM if any(each.cases for each in verdicts) else NOTHING_TESTED


def _cases(subjects: list[tuple[Subject, str | None]], tasks: list[Task]) -> tuple[float, int]:
    """By what groups are begun: those whose cases are dear, and so few, then the large ones."""
    return subjects[tasks[0][0]][0].contract.cases, -len(tasks)


def _no_answer(subject: Subject, name: str, died: Died, seconds: float) -> Verdict:
    code = died.exit_code or 0
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    reason = f"the judge had no verdict within {seconds:.0f} s" if died.late else f"the judge's process died ({how})"
    return verdict_on(subject, name, "error", reason, died.seconds)
