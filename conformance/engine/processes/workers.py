"""Worker processes of the gate, in which verdicts are reached; candidates run in others (`perform.py`).

pytest-xdist's grouped schedulers do not survive a worker's death (KeyError in 3.8), and its ungrouped one would compute every
error budget in every process; hence this small pool.
"""

import atexit
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from gaugeblock.conformance.engine.processes import nursery

Task = TypeVar("Task")


def use_one_thread() -> None:
    """Has this process, and those that come from it, compute in one thread: there is one process for each core."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def get_ready(module: str) -> None:
    """Has a server process import a module, meanwhile; workers and the nursery are forked from it, in milliseconds each."""
    use_one_thread()
    forkserver.set_forkserver_preload([module])
    forkserver.ensure_running()
    nursery.start(from_server=True)


@dataclass(frozen=True)
class Died:
    """A task that got no answer: its process died, or was killed when its time was up."""

    late: bool
    exit_code: int | None
    seconds: float


@dataclass
class _Worker(Generic[Task]):
    process: Any
    connection: Connection
    group: str = ""
    task: Task | None = None
    started: float = 0.0


def run_tasks(
    groups: Mapping[str, Sequence[Task]],
    prepare: Callable[..., Callable[[Task], Any]],
    arguments: tuple[Any, ...],
    *,
    workers: int,
    seconds: float,
    alone: Collection[str] = (),
    known: Callable[[Task], Any] = lambda task: None,
) -> Iterator[tuple[Task, Any]]:
    """Runs every task in some worker and yields it with its result, or with `Died`, as they come.

    Args:
        groups: Tasks that share cached work, the longest first; a worker finishes a group before it takes the next, or helps
            another.
        prepare: Called with `arguments` once in each process; returns the function of a task. Both must be importable.
        seconds: How long one task may take.
        alone: Groups that are one worker's, whom nobody helps.
        known: The result of a task that need not be run any more, after what has come so far; else None.
    """
    waiting = {name: list(tasks) for name, tasks in groups.items() if tasks}
    pool = [_start(prepare, arguments) for _ in range(min(workers, sum(map(len, waiting.values()))))]
    try:
        while pool:
            for worker in [each for each in pool if each.task is None]:
                for task in _its_tasks(worker, waiting, pool, alone):
                    if (result := known(task)) is None:
                        _give(worker, task)
                        break
                    yield task, result
                else:
                    pool.remove(worker)
                    _stop(worker)
            now = time.monotonic()
            soonest = min((each.started + seconds for each in pool), default=now)
            ready = wait([each.connection for each in pool], timeout=max(0.0, soonest - now))
            for worker in list(pool):
                late = time.monotonic() - worker.started > seconds
                if worker.connection not in ready and not late:
                    continue
                result = _answer(worker) if worker.connection in ready else _kill(worker, late=True)
                assert worker.task is not None
                yield worker.task, result
                worker.task = None
                if isinstance(result, Died):
                    pool.remove(worker)
                    if waiting:
                        pool.append(_start(prepare, arguments))
    finally:
        for worker in pool:  # only after an error or an interrupt
            _kill(worker, late=True)


def _start(prepare: Callable[..., Any], arguments: tuple[Any, ...]) -> _Worker:
    context = multiprocessing.get_context("forkserver")  # to fork this process is unsafe once torch or jax has started threads
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, dict(os.environ), prepare, arguments), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(
    connection: Connection, environment: Mapping[str, str], prepare: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()  # of the time when the server was started
    os.environ.update(environment)
    tempfile.tempdir = None  # which is in the environment
    function = prepare(*arguments)
    while (task := connection.recv()) is not None:
        connection.send(function(task))
    atexit._run_exitfuncs()  # which multiprocessing leaves out: folders for temporary files would stay


def _its_tasks(worker: _Worker, waiting: dict[str, list], pool: Sequence[_Worker], alone: Collection[str]) -> Iterator[Any]:
    """What a worker should do next, taken from what is waiting: of its own group, of one that nobody works at, else of one where
    it can help.
    """
    while True:
        if worker.group not in waiting:
            busy = {each.group for each in pool}
            free = [name for name in waiting if name not in busy]
            choice = free or [name for name in waiting if name not in alone]
            if not choice:
                return
            worker.group = choice[0]
        task = waiting[worker.group].pop(0)
        if not waiting[worker.group]:
            del waiting[worker.group]
        yield task


def _give(worker: _Worker, task: Any) -> None:
    worker.task, worker.started = task, time.monotonic()
    with suppress(OSError):  # the answer of one that died in between will be its end
        worker.connection.send(task)


def _answer(worker: _Worker) -> Any:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        return _kill(worker, late=False)


def _kill(worker: _Worker, *, late: bool) -> Died:
    if late:
        worker.process.kill()
    worker.process.join(timeout=5)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    worker.connection.close()
    return Died(late, worker.process.exitcode, time.monotonic() - worker.started)


def _stop(worker: _Worker) -> None:
    with suppress(OSError):
        worker.connection.send(None)
    _kill(worker, late=False)
