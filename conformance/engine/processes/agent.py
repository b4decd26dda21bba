"""The keeper of a rank's process under torchrun: starts, watches and kills it as the judge asks, through torchrun's store.

Each process that torchrun started, on every node, is the agent of one rank; the process that it keeps knocks at the judge's door.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from gaugeblock.conformance.engine.processes import keeper

FOREVER = timedelta(days=7)
POLL_SECONDS = 0.05
END_SECONDS = 5.0  # for a process, and all that come from it, to be gone
TRACE_SECONDS = 0.5  # for a signalled process to write down where it stands


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen
    errors: Path
    reported: bool = False


def connect(host: str, port: int) -> Any:
    """A client of the store."""
    import torch.distributed as dist

    return dist.TCPStore(host, port, is_master=False, timeout=FOREVER)


def serve(host: str, port: int, ranks: Sequence[int]) -> None:
    """Keeps the processes of `ranks` as the judge asks, until it says that all is over or is gone."""
    with tempfile.TemporaryDirectory(prefix="gaugeblock-ranks-") as folder:
        children: list[_Child] = []
        try:
            _serve(host, port, ranks, Path(folder), children)
        except (RuntimeError, ConnectionError, OSError):  # the store is gone, and the leader with it
            pass
        finally:
            _kill(children)


def start_thread(host: str, port: int, ranks: Sequence[int]) -> threading.Thread:
    """`serve` in a thread of this process."""
    thread = threading.Thread(target=serve, args=(host, port, ranks), daemon=True, name="gaugeblock-ranks")
    thread.start()
    return thread


def _serve(host: str, port: int, ranks: Sequence[int], folder: Path, children: list[_Child]) -> None:
    store, generation, traced = connect(host, port), "", False
    while not store.check(["over"]):
        wanted = store.get("generation").decode() if store.check(["generation"]) else ""
        if wanted != generation:
            _kill(children)
            generation, traced = wanted, False
            size = int(store.get(f"{generation}/size"))
            children += [_start(store, generation, rank, folder) for rank in ranks if rank < size]
        for child in children:
            if not child.reported and child.process.poll() is not None:
                child.reported = True
                store.set(f"{generation}/died/{child.rank}", f"{child.process.returncode}\n{child.errors.read_text()}")
        if generation and not traced and store.check([f"{generation}/trace"]):
            traced = True
            for child in children:
                store.set(f"{generation}/traced/{child.rank}", _trace(child))
        time.sleep(POLL_SECONDS)


def _start(store: Any, generation: str, rank: int, folder: Path) -> _Child:
    errors = folder / f"{generation}-{rank}"
    door = store.get(f"{generation}/door/{rank}").decode().split()
    command = [*keeper.command(os.getpid()), sys.executable, "-m", "gaugeblock.conformance.engine.processes.process", *door]
    path = os.pathsep.join(filter(None, sys.path))
    with errors.open("w") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, env=os.environ | {"PYTHONPATH": path}
        )
    return _Child(rank, process, errors)


def _trace(child: _Child) -> str:
    before = len(child.errors.read_text())
    with suppress(ProcessLookupError):
        child.process.send_signal(signal.SIGUSR1)
    time.sleep(TRACE_SECONDS)
    return child.errors.read_text()[before:]


def _kill(children: list[_Child]) -> None:
    for child in children:
        child.process.terminate()
    for child in children:
        try:
            child.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
    children.clear()
