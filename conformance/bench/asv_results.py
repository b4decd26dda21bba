"""`gaugeblock bench --asv DIR`: this machine's results in asv's JSON format, for machines that have no asv."""

import argparse
import itertools
import json
import math
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from gaugeblock.conformance.bench import history
from gaugeblock.conformance.bench.roofline import processor

MEASURED, FAILED, NOTHING_MEASURED = 0, 1, 3
RESULTS_VERSION, MACHINE_VERSION = 2, 1  # of asv's formats
COLUMNS = ["result", "params", "version", "started_at", "duration"]
HASH = re.compile(r"[0-9a-f]{40}")


def main(options: argparse.Namespace) -> int:
    """Asks every question about the subjects of the chosen contracts, and writes what `asv publish` reads.

    Returns:
        0; 1 if an implementation failed; 3 if nothing was measured.

    Raises:
        ValueError: If the commit is not known, or a contract.
    """
    commit = options.commit or head()
    if not HASH.fullmatch(commit):
        raise ValueError(f"--commit must be a full hash of 40 digits, got {commit!r}")
    subjects = {name.partition(".")[0] for name in options.contract} or set(history.subjects())
    if unknown := subjects - set(history.subjects()):
        raise ValueError(f"unknown subject {min(unknown)!r}; known: {', '.join(history.subjects())}")
    results: dict[str, list[Any]] = {}
    failures = 0
    for name, question in history.benchmarks():
        if question.subject in subjects:
            start = time.time()
            answers = question().setup_cache()
            for metric in question.metrics:
                results[f"{name}.track_{metric}"] = [*_entry(question, answers, metric), int(1e3 * start), time.time() - start]
            reasons = {point: answer for point, answer in answers.items() if isinstance(answer, str)}
            print(f"{name}: {len(answers) - len(reasons)} measured, {len(reasons)} failed")
            for point, reason in reasons.items():
                print(f"  {' / '.join(point)}: {reason}")
            failures += len(reasons)
    machine = options.machine or platform.node()
    print(f"written: {write(options.asv, machine, commit, results)}")
    if not any(value is not None for row in results.values() for value in row[0]):
        return NOTHING_MEASURED
    return FAILED if failures else MEASURED


def write(folder: Path, machine: str, commit: str, results: dict[str, list[Any]]) -> Path:
    """Writes `machine.json` and the results of one commit in the folder `machine` of `folder`; returns the results' path."""
    python = ".".join(platform.python_version_tuple()[:2])
    described = {
        "machine": machine,
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "cpu": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "num_cpu": str(os.cpu_count()),
        "ram": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }
    document = {
        "commit_hash": commit,
        "env_name": f"existing-py{python}",
        "date": int(1e3 * time.time()),  # asv orders commits by the repository; this is shown where a date is
        "params": {"machine": machine, "python": python},
        "python": python,
        "requirements": {},
        "env_vars": {},
        "result_columns": COLUMNS,
        "results": results,
        "durations": {},
        "version": RESULTS_VERSION,
    }
    (folder / machine).mkdir(parents=True, exist_ok=True)
    (folder / machine / "machine.json").write_text(json.dumps(described | {"version": MACHINE_VERSION}, indent=1))
    path = folder / machine / f"{commit[:8]}-{document['env_name']}.json"
    path.write_text(json.dumps(document, indent=1))
    return path


def head() -> str:
    """The commit of the working tree.

    Raises:
        ValueError: If the current folder is in no git repository.
    """
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError("this folder is in no git repository: say by --commit HASH what is measured")
    return found.stdout.strip()


def _entry(question: type[history.Question], answers: history.Answers, metric: str) -> list[Any]:
    """Values in the order of asv's parameters, those parameters as asv writes them, and the version."""
    points = itertools.product(*question.params)
    return [
        [_finite(answers.get(point), metric) for point in points],
        [[repr(value) for value in values] for values in question.params],
        question.version,
    ]


def _finite(answer: dict[str, float] | str | None, metric: str) -> float | None:
    value = answer.get(metric, math.nan) if isinstance(answer, dict) else math.nan
    return value if math.isfinite(value) else None
