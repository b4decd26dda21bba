"""`gaugeblock bench --asv DIR`: results in asv's JSON format, of this tree or of earlier commits, by machine and commit.

asv would start a process for each of some 1600 points; here a question is asked once. Times are kept under this machine's name:
they compare with no other's. Counters, accuracy and determinism are the same on every machine of a kind, whose name they are kept
under: they are the history, whoever measures.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gaugeblock.conformance.bench import ask, history
from gaugeblock.conformance.bench.against import lay_out
from gaugeblock.conformance.bench.roofline import processor
from gaugeblock.conformance.engine.devices import interpret_without_gpu, quick_flags

MEASURED, FAILED, NOTHING_MEASURED = 0, 1, 3
RESULTS_VERSION, MACHINE_VERSION = 2, 1  # of asv's formats
COLUMNS = ["result", "params", "version", "started_at", "duration"]
HASH = re.compile(r"[0-9a-f]{40}")
OPERATIONS = ("reference", "optimized")  # the folders whose changes make a commit worth measuring
WORKERS = 2  # for what is not timed


def main(options: argparse.Namespace) -> int:
    """Asks the questions about the families of the chosen contracts, and writes what `asv publish` reads.

    Returns:
        0; 1 if an implementation failed; 3 if nothing was measured.

    Raises:
        ValueError: If the commit is not known, or a contract or question.
    """
    if options.history is not None:
        return measure_earlier(options)
    commit = options.commit or head()
    if not HASH.fullmatch(commit):
        raise ValueError(f"--commit must be a full hash of 40 digits, got {commit!r}")
    if not options.commit and _git("status", "--porcelain", "--untracked-files=no"):
        print(f"note: the working tree is not commit {commit[:8]}, under which its results are kept")
    measured, failures = 0, 0
    for timed, questions in ((False, untimed(options)), (True, set(chosen(options)) - set(untimed(options)))):
        if questions:
            rows, failed = asked(questions, families_of(options), None if timed else WORKERS)
            print(f"written: {write(options.asv, (options.machine or this()) if timed else kind(), commit, rows)}")
            measured, failures = measured + count(rows), failures + failed
    if not measured:
        return NOTHING_MEASURED
    return FAILED if failures else MEASURED


def measure_earlier(options: argparse.Namespace) -> int:
    """The same of the last commits that changed an operation and have no results yet; what fails there is history.

    Raises:
        ValueError: If the number of commits is not positive, or something is to be timed.
    """
    if options.history < 1:
        raise ValueError(f"--history must be a number of commits, 1 or more, got {options.history}")
    if set(ask.TIMED) & set(options.question) or not untimed(options):
        raise ValueError(
            f"--history: {' and '.join(ask.TIMED)} are timed, and times of another day's machine compare with nothing"
        )
    head()
    folder = options.asv / kind()
    for commit in _git("log", "--first-parent", f"-{options.history}", "--format=%H", "--", *OPERATIONS).split():
        if list(folder.glob(f"{commit[:8]}-*.json")):
            print(f"{commit[:8]}: is there already")
            continue
        print(f"{commit[:8]}: {_git('show', '--no-patch', '--format=%s', commit)}")
        with tempfile.TemporaryDirectory() as laid_out:
            tree = lay_out(commit, Path(laid_out))
            if not (tree / "conformance/bench/history.py").exists():
                print("  has no benchmarks")
                continue
            rows, _ = asked(untimed(options), families_of(options), WORKERS, tree)
        print(f"written: {write(options.asv, kind(), commit, rows)}")
    return MEASURED if list(folder.glob("*-*.json")) else NOTHING_MEASURED


def asked(
    questions: Iterable[str], families: Iterable[str], workers: int | None, tree: Path | None = None
) -> tuple[ask.Rows, int]:
    """Answers as rows of results, and how many are failures.

    Args:
        workers: Processes of one thread each; None for one that has all threads, and in which XLA optimizes as it does for users.
        tree: An earlier commit's; None for this one.

    Raises:
        ValueError: If it cannot be asked.
    """
    interpret_without_gpu()
    environment = os.environ | ({"OMP_NUM_THREADS": "1", "XLA_FLAGS": quick_flags()} if workers else {})
    if tree:
        environment["PYTHONPATH"] = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.json"
        named = [text for name in questions for text in ("--question", name)]
        named += [text for name in families for text in ("--family", name)]
        command = [sys.executable, "-P", ask.__file__, str(path), *named, "--workers", str(workers or 1)]
        status = subprocess.run(command, cwd=tree, env=environment, check=False).returncode
        if status:
            raise ValueError(f"--asv: the questions could not be asked; the process ended with {status}")
        answers = json.loads(path.read_text())
    return answers["rows"], answers["failures"]


def write(folder: Path, machine: str, commit: str, rows: ask.Rows) -> Path:
    """Writes one commit's results and `machine.json` in the folder `machine`, beside what was there; returns their path."""
    python = ".".join(platform.python_version_tuple()[:2])
    described = {"machine": machine, "arch": platform.machine()}
    if machine != kind():
        described |= {
            "os": f"{platform.system()} {platform.release()}",
            "cpu": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            "num_cpu": str(os.cpu_count()),
            "ram": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        }
    (folder / machine).mkdir(parents=True, exist_ok=True)
    _save(folder / machine / "machine.json", described | {"version": MACHINE_VERSION})
    environment = f"existing-py{python}"
    path = folder / machine / f"{commit[:8]}-{environment}.json"
    before = json.loads(path.read_text())["results"] if path.exists() else {}
    document = {
        "commit_hash": commit,
        "env_name": environment,
        "date": int(1e3 * time.time()),  # asv orders commits by the repository; this is shown where a date is
        "params": {"machine": machine, "python": python},
        "python": python,
        "requirements": {},
        "env_vars": {},
        "result_columns": COLUMNS,
        "results": before | rows,
        "durations": {},
        "version": RESULTS_VERSION,
    }
    _save(path, document)
    return path


def chosen(options: argparse.Namespace) -> list[str]:
    """The questions asked for.

    Raises:
        ValueError: If one is not known.
    """
    known = [question.__name__ for question in history.QUESTIONS]
    if unknown := set(options.question) - set(known):
        raise ValueError(f"--question must be one of {', '.join(known)}, got {min(unknown)!r}")
    return options.question or known


def untimed(options: argparse.Namespace) -> list[str]:
    """Those of them whose answers are the same on every machine of a kind."""
    return [name for name in chosen(options) if name not in ask.TIMED]


def families_of(options: argparse.Namespace) -> list[str]:
    """The families of the contracts asked for.

    Raises:
        ValueError: If one is not known.
    """
    known = list(history.families())
    families = {name.partition(".")[0] for name in options.contract} or set(known)
    if unknown := families - set(known):
        raise ValueError(f"unknown family {min(unknown)!r}; known: {', '.join(known)}")
    return [name for name in known if name in families]


def kind() -> str:
    """The name of all machines like this one: the GPU's, or what instructions the CPU has."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return _slug(name)


def this() -> str:
    """The name of this machine, whose times compare with each other."""
    return _slug(f"{platform.node()} {torch.cuda.get_device_name() if torch.cuda.is_available() else processor()}")


def head() -> str:
    """The commit of the working tree.

    Raises:
        ValueError: If the current folder is in no git repository.
    """
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError("this folder is in no git repository: say by --commit HASH what is measured")
    return found.stdout.strip()


def count(rows: ask.Rows) -> int:
    """How many numbers there are."""
    return sum(value is not None for values, *_ in rows.values() for value in values)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _save(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n")
