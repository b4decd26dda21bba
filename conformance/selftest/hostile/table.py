"""What the gate must say of each hostile candidate, and what it does say.

A row names a property that has to see what the candidate does. `pass` is right for a candidate that does harm to none but itself.
"""

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gaugeblock.conformance.engine.exploration import PROFILES, examine
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.judging.verdict import Status, Verdict
from gaugeblock.conformance.engine.processes import handle
from gaugeblock.conformance.engine.processes.loading import describe_candidates
from gaugeblock.conformance.engine.processes.output import KEPT_OUTPUT
from gaugeblock.conformance.engine.properties import properties
from gaugeblock.conformance.engine.registry import RegistrationError
from gaugeblock.conformance.engine.trial import Subject
from gaugeblock.conformance.exit_status import FAILS

BRIEF = replace(PROFILES["quick"], shrink_seconds=0.2)
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Hostile:
    """A candidate of a file of this folder.

    Attributes:
        says: What the verdict's reason must contain.
        also: A status that may come instead, by chance, for another reason.
        output: What must be among that which the candidate is shown to have printed.
    """

    file: str
    name: str
    property: str
    status: Status
    says: str = ""
    output: str = ""
    also: Status | None = None


@dataclass(frozen=True)
class Unloadable:
    """A file that is not even judged: the message, of one line, must contain `says`."""

    file: str
    says: str


HOSTILE = (
    Hostile("memory.py", "input-mutated", "inputs_unchanged", "fail", "an input was written to"),
    Hostile("memory.py", "input-aliased", "inputs_unchanged", "fail", "an input was written to"),
    Hostile("memory.py", "stale-result", "same_pointer_new_data", "fail", "topk_"),
    Hostile("memory.py", "cached-by-pointer", "same_pointer_new_data", "fail", "topk_"),
    Hostile("memory.py", "workspace-returned", "hidden_state", "fail", "writes to the memory of this result"),
    Hostile("memory.py", "written-later", "hidden_state", "fail", "writes to the memory of this result"),
    Hostile("memory.py", "right-at-first", "parity", "fail", "topk_weights: "),
    Hostile("answers.py", "judge-patched", "parity", "fail", "topk_weights: "),
    Hostile("answers.py", "stack-read", "parity", "fail", "topk_weights: "),
    Hostile("answers.py", "engine-searched", "parity", "fail", "topk_weights: "),
    Hostile("answers.py", "files-searched", "parity", "fail", "topk_weights: "),
    Hostile("answers.py", "engine-imitated", "parity", "pass"),
    Hostile("loading/engine_patched.py", "engine-patched", "parity", "fail", "topk_weights: "),
    Hostile("loading/runner_patched.py", "runner-patched", "parity", "fail", "topk_weights: "),
    Hostile("results.py", "lazy-subclass", "parity", "fail", "is a Lazy, expected a plain torch.Tensor"),
    Hostile("results.py", "huge-claimed", "parity", "fail", "(1099511627776,)"),
    Hostile("results.py", "huge-beyond-counting", "parity", "fail", "multiplication overflow"),
    Hostile("results.py", "huge-indeed", "determinism", "fail", "(268435456,)"),
    Hostile("results.py", "sparse", "parity", "fail", "topk_weights cannot be read"),
    Hostile("results.py", "memory-gone", "parity", "crash", "the process died (SIGSEGV)"),
    Hostile("results.py", "other-shape-later", "determinism", "fail", "has shape"),
    Hostile("endings.py", "os-exit", "parity", "crash", "the process died (exit status 0)"),
    Hostile("endings.py", "sys-exit", "parity", "fail", "raised SystemExit"),
    Hostile("endings.py", "segmentation-fault", "parity", "crash", "the process died (SIGSEGV)"),
    Hostile("endings.py", "killed", "parity", "crash", "the process died (SIGKILL)"),
    Hostile("endings.py", "stopped", "parity", "timeout", "no answer within"),
    Hostile("endings.py", "keyboard-interrupt", "parity", "fail", "raised KeyboardInterrupt"),
    Hostile("endings.py", "memory-taken", "parity", "fail", "can't allocate memory"),
    Hostile("endings.py", "malicious-error", "parity", "fail", "raised Malicious"),
    Hostile("endings.py", "endless-error", "parity", "fail", "raised ValueError"),
    Hostile("waits.py", "endless-loop", "parity", "timeout", "no answer within"),
    Hostile("waits.py", "holds-the-lock", "parity", "timeout", "no answer within"),
    Hostile("waits.py", "signals-ignored", "parity", "timeout", "no answer within"),
    Hostile("waits.py", "prints-without-end", "parity", "timeout", "no answer within", "nothing to see here"),
    Hostile("processes.py", "child-answers", "parity", "crash", "it was forked"),
    Hostile("processes.py", "both-answer", "determinism", "crash", "it was forked"),
    Hostile("processes.py", "many-children", "parity", "crash", "more than 64 processes"),
    Hostile("processes.py", "few-children-left", "parity", "pass"),
    Hostile("processes.py", "daemon-left", "parity", "crash", "the process died (exit status 3)"),
    Hostile("processes.py", "keeper-killed", "parity", "crash", "the process died (SIGKILL)"),
    Hostile("processes.py", "nursery-killed", "parity", "crash", "the process died with all that"),
    Hostile("processes.py", "works-in-a-child", "parity", "pass"),
    Hostile("printing.py", "prints-much", "parity", "fail", "topk_weights: ", "the first line"),
    Hostile("printing.py", "prints-and-is-right", "parity", "pass"),
    Hostile("printing.py", "output-closed", "parity", "pass"),
    Hostile("printing.py", "files-closed", "parity", "crash", "the process"),
    Hostile("settings.py", "default-dtype-changed", "process_settings", "fail", "the default dtype"),
    Hostile("settings.py", "seed-set", "process_settings", "fail", "the random state"),
    Hostile("settings.py", "threads-set", "process_settings", "fail", "the number of threads"),
    Hostile("settings.py", "folder-and-path-changed", "parity", "pass"),
    Hostile("settings.py", "temporary-folder-deleted", "parity", "pass"),
    Hostile("settings.py", "timer-set", "parity", "fail", "the timer of a candidate", also="crash"),
    Hostile("settings.py", "end-prepared", "parity", "pass"),
    Hostile("connection.py", "garbage-sent", "parity", "crash", "the process sent a message of"),
    Hostile("connection.py", "pickle-sent", "parity", "crash", "the process sent no JSON"),
    Hostile("connection.py", "much-announced", "parity", "crash", "the process sent a message of 1152921504606846976 bytes"),
    Hostile("connection.py", "deep-answer", "parity", "crash", "the process sent no JSON"),
    Hostile("connection.py", "results-beyond-memory", "parity", "crash", "the process sent no results"),
    Hostile("connection.py", "results-of-no-type", "parity", "crash", "the process sent no results"),
    Hostile("connection.py", "results-only-claimed", "determinism", "fail", "topk_weights has shape", also="crash"),
    Hostile("connection.py", "answered-twice", "rejections", "crash", "an answer to no call, or to another one"),
    Hostile("connection.py", "findings-of-no-type", "parity", "crash", "the process sent no results"),
    Hostile("connection.py", "results-overwritten", "parity", "fail", "topk_"),
)

UNLOADABLE = (
    Unloadable("loading/never_returns.py", "while it was imported, no answer within"),
    Unloadable("loading/registers_in_a_loop.py", "while it was imported, no answer within"),
    Unloadable("loading/dies.py", "while it was imported, the process died (exit status 0): I have decided to leave"),
    Unloadable("loading/exits.py", "SystemExit: 0"),
    Unloadable("loading/interrupts.py", "KeyboardInterrupt"),
    Unloadable("loading/registers_many.py", "while it was imported, the process sent a message of"),
    Unloadable("loading/takes_memory.py", "Cannot allocate memory"),
    Unloadable("loading/tells_another_source.py", "selftest.candidates"),
)

DEAD_SECONDS, SILENT_SECONDS = 20.0, 180.0  # that a candidate may cost which always dies, and one which never answers
BUDGETED = (("os-exit", DEAD_SECONDS), ("endless-loop", SILENT_SECONDS))


@dataclass(frozen=True)
class Outcome:
    """What became of a row, and what is wrong with that, in a sentence; an empty string if it is as expected."""

    row: Hostile | Unloadable
    verdict: Verdict | None
    wrong: str


@contextmanager
def impatience(call_seconds: float = 5.0, load_seconds: float = 10.0) -> Iterator[None]:
    """No call, and no file that is imported, is waited for longer."""
    before = handle.CALL_SECONDS, handle.LOAD_SECONDS
    handle.CALL_SECONDS, handle.LOAD_SECONDS = call_seconds, load_seconds
    try:
        yield
    finally:
        handle.CALL_SECONDS, handle.LOAD_SECONDS = before


def load(files: Iterable[str]) -> dict[tuple[str, str], Implementation]:
    """What these files register, by file and name."""
    told = describe_candidates(tuple(str(FOLDER / each) for each in files))
    return {(str(Path(each.function.source).relative_to(FOLDER)), each.name): each for each in told}  # type: ignore[union-attr]


def judge(row: Hostile, implementation: Implementation) -> Outcome:
    """The verdict on a row's property."""
    subject = Subject(implementation, implementation.dtypes[0], "cpu")
    verdict = examine(subject, properties()[row.property], BRIEF, str(FOLDER / row.file))
    printed = verdict.failure.output if verdict.failure else ""
    if verdict.status != row.also and (verdict.status != row.status or row.says not in verdict.reason):
        return Outcome(row, verdict, f"{row.name}: {verdict.status}, {verdict.reason!r} instead of {row.status}, {row.says!r}")
    if row.output not in printed or len(printed) > KEPT_OUTPUT + 100:
        return Outcome(row, verdict, f"{row.name}: {len(printed)} characters of output, without {row.output!r}")
    return Outcome(row, verdict, "")


def files() -> list[str]:
    """All files of candidates, those that can be judged first."""
    return list(dict.fromkeys(each.file for each in (*HOSTILE, *UNLOADABLE)))


def outcomes(file: str) -> list[Outcome]:
    """What becomes of all rows of one file."""
    with impatience():
        wrong = [try_to_load(each) for each in UNLOADABLE if each.file == file]
        rows = [each for each in HOSTILE if each.file == file]
        loaded = load([file]) if rows else {}
        return wrong + [judge(each, loaded[file, each.name]) for each in rows]


def whole_gate(row: Hostile, most_seconds: float) -> str:
    """What is wrong with the verdicts of every property on a lost candidate, or with the time until they are there."""
    command = [sys.executable, "-m", "gaugeblock.conformance.cli", "check", str(FOLDER / row.file), "--implementation", row.name]
    command += ["--kept", "off"]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - start
    if done.returncode != FAILS or "not tried again" not in done.stdout or row.says not in done.stdout:
        return f"{row.name}: exit status {done.returncode}: {done.stdout[-500:]}"
    return "" if seconds <= most_seconds else f"{row.name}: {seconds:.0f} s until all is said of it, {most_seconds:.0f} s may be"


def try_to_load(row: Unloadable) -> Outcome:
    """What is said of a file that cannot be judged."""
    try:
        load([row.file])
    except RegistrationError as error:
        message = str(error)
        fine = row.says in message and "\n" not in message and len(message) < 1000
        return Outcome(row, None, "" if fine else f"{row.file}: {message[:1000]!r} instead of {row.says!r}")
    return Outcome(row, None, f"{row.file}: was loaded")
