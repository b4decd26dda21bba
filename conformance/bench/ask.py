"""Asks the questions of `history` about one tree, this one or an earlier commit's, in processes of their own.

    python -P ask.py FILE --question Counters --question Accuracy --family experts --workers 2

It is run as a script, with the tree first in `PYTHONPATH`, and so uses nothing of it but what every commit has that has any
questions. The answers go to FILE, as the rows of asv's results.
"""

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

HISTORY, COUNTERS = "gaugeblock.conformance.bench.history", "gaugeblock.conformance.bench.counters"
TIMED = ("Cost", "Decoding")  # nothing watches kernels then; in all else they are interpreted alike in every tree
LONGEST_FIRST = ("experts", "dit", "moe_layers", "routers")

_own = threading.local()  # a thread's process

Rows = dict[str, list[Any]]  # by the names of asv's benchmarks: values, parameters, version, when it began, how long it took


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the answers, and prints how many there are as they come."""
    parser = argparse.ArgumentParser(prog="ask.py", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--question", action="append", required=True)
    parser.add_argument("--family", action="append", required=True)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    families = sorted(options.family, key=lambda name: (*LONGEST_FIRST, name).index(name))
    rows: Rows = {}
    failures = 0
    with ThreadPoolExecutor(options.workers) as threads:
        for some, failed in threads.map(partial(answer_elsewhere, questions=options.question), families):
            rows, failures = rows | some, failures + failed
    options.file.write_text(json.dumps({"rows": rows, "failures": failures}))


def answer_elsewhere(family: str, questions: Sequence[str]) -> tuple[Rows, int]:
    """The same as `answer`, of this thread's process; one that dies has failed, and the next family gets another."""
    pool = getattr(_own, "pool", None) or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    _own.pool = pool
    try:
        return pool.submit(answer, family, questions).result()
    except BrokenProcessPool:
        print(f"{family}: the process that measures has died", flush=True)
        _own.pool = None
        return {}, 1


def answer(family: str, questions: Sequence[str]) -> tuple[Rows, int]:
    """The rows of some questions about one family, and how many answers are failures; a tree may not have every question."""
    rows: Rows = {}
    failures = 0
    for name, question in importlib.import_module(HISTORY).benchmarks():
        if name.partition(".")[0] != family or name.partition(".")[2] not in questions:
            continue
        start = time.time()
        with nullcontext() if name.endswith(TIMED) else importlib.import_module(COUNTERS).watch():
            answers = question().setup_cache()
        for metric in question.metrics:
            rows[f"{name}.track_{metric}"] = [*_values(question, answers, metric), int(1e3 * start), time.time() - start]
        failed = {point: reason for point, reason in answers.items() if isinstance(reason, str)}
        told = [f"  {' / '.join(point)}: {reason}" for point, reason in failed.items()]
        print("\n".join([f"{name}: {len(answers) - len(failed)} measured, {len(failed)} failed", *told]), flush=True)
        failures += len(failed)
    return rows, failures


def _values(question: Any, answers: dict[tuple[str, ...], Any], metric: str) -> list[Any]:
    """Values in the order of asv's parameters, those parameters as asv writes them, and the version."""
    points = itertools.product(*question.params)
    return [
        [_finite(answers.get(point), metric) for point in points],
        [[repr(value) for value in values] for values in question.params],
        question.version,
    ]


def _finite(found: Any, metric: str) -> float | None:
    value = found.get(metric, math.nan) if isinstance(found, dict) else math.nan
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
