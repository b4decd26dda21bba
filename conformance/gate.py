"""`gaugeblock check`: every property on every subject in worker processes; the verdicts shown and written down."""

import argparse
import datetime
import os
import signal
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable

from rich.console import Console

from gaugeblock.conformance.cli import CONFORM, FAILS, NOTHING_TESTED
from gaugeblock.conformance.devices import cache_compilations, compile_quickly, set_up_process
from gaugeblock.conformance.exploration import PROFILES, examine
from gaugeblock.conformance.properties import find_property, properties
from gaugeblock.conformance.report import files, terminal, waivers
from gaugeblock.conformance.report.environment import capture_environment
from gaugeblock.conformance.selection import Filters, subjects_of
from gaugeblock.conformance.trial import Subject
from gaugeblock.conformance.verdict import FAILED, Status, Verdict
from gaugeblock.conformance.workers import Died, run_tasks

Task = tuple[int, str]  # the subject's number and the property's name
RANKS = "ranks"


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
                found[number, name] = _verdict(subject, name, "not supported", reason)
            else:
                groups[f"{RANKS}/{subject.device}" if subject.on_ranks else shared].append((number, name))
    profile = PROFILES[options.profile]
    workers = len(os.sched_getaffinity(0)) if options.workers is None else max(1, options.workers)
    os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", tempfile.gettempdir())  # nothing is left in the user's folder
    cache_compilations()
    compile_quickly()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process for each core, not each with a thread for every core
    with terminal.progress(sum(map(len, groups.values())), console) as progress:
        arguments = (tuple(options.candidates), filters, profile.name)
        alone = [name for name in groups if name.startswith(RANKS)]  # one worker leads the ranks, so that they start once
        waiting = dict(sorted(groups.items(), key=lambda group: (group[0] not in alone, _cases(subjects, group[1]))))
        for task, result in run_tasks(waiting, prepare, arguments, workers=workers, seconds=profile.verdict_seconds, alone=alone):
            subject = subjects[task[0]][0]
            found[task] = _no_answer(subject, task[1], result, profile.verdict_seconds) if isinstance(result, Died) else result
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


def prepare(candidates: tuple[str, ...], filters: Filters, profile: str) -> Callable[[Task], Verdict]:
    """Sets a worker process up; the returned function judges one task."""
    set_up_process()
    warnings.filterwarnings("ignore", module="triton")  # its interpreter tells of NaN and infinity that cases hold on purpose
    warnings.filterwarnings("ignore", message="invalid value encountered in reduce")  # so does numpy under it
    subjects = subjects_of(candidates, filters)

    def judge(task: Task) -> Verdict:
        subject, source = subjects[task[0]]
        return examine(subject, properties()[task[1]], PROFILES[profile], source)

    return judge


def exit_status(verdicts: list[Verdict]) -> int:
    """0 all conform, 1 something fails, 3 nothing was tested."""
    if any(each.status in FAILED for each in verdicts):
        return FAILS
    return CONFORM if any(each.cases for each in verdicts) else NOTHING_TESTED


def _cases(subjects: list[tuple[Subject, str | None]], tasks: list[Task]) -> tuple[float, int]:
    """By what groups are begun: those whose cases are dear, and so few, then the large ones."""
    return subjects[tasks[0][0]][0].contract.cases, -len(tasks)


def _no_answer(subject: Subject, name: str, died: Died, seconds: float) -> Verdict:
    code = died.exit_code or 0
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    if died.late:
        return _verdict(subject, name, "timeout", f"no answer within {seconds:.0f} s", died.seconds)
    return _verdict(subject, name, "crash", f"the process died ({how})", died.seconds)


def _verdict(subject: Subject, name: str, status: Status, reason: str, seconds: float = 0.0) -> Verdict:
    """A verdict on what was not judged to its end."""
    whose = subject.implementation
    return Verdict(
        whose.contract, whose.name, whose.kind, name, subject.dtype, subject.device, status, seconds=seconds, reason=reason
    )
