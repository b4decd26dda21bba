"""Where candidates' processes come from: one process that has imported torch, and forks whenever another is wanted.

To import torch takes more than a second, for every process anew; a fork takes milliseconds. The nursery runs nothing itself, so
it has no threads that a fork would lose, and no driver of a GPU that would refuse to work after one. What it forked, and whatever
came from that, ends with it, and with whoever asked for it.
"""

import gc
import importlib
import json
import multiprocessing
import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gaugeblock.conformance.engine.processes import keeper

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MOST_FILES = 16
END_SECONDS = 3.0  # for a keeper to end what it keeps
GONE = -1000  # the status of a process that ended with the nursery
NUMBER = struct.Struct("<q")


@dataclass
class Child:
    """A process that was forked for whoever holds this."""

    pid: int
    connection: socket.socket
    """Can be read when the process has ended; closed, it ends the process and all that came from it."""
    status: int | None = None

    def poll(self, seconds: float = 0.0) -> int | None:
        """The exit status, negative for a signal, `GONE` if the nursery is gone, and all with it; None while it runs."""
        waited: list[Any] = [self.connection]
        if self.status is None and select.select(waited, [], [], seconds)[0]:
            try:
                self.status = NUMBER.unpack(_exactly(self.connection, NUMBER.size))[0]
            except OSError:
                self.status = GONE
        return self.status

    def end(self) -> None:
        """Ends it, and all that came from it; comes back when they are gone."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.poll(seconds=10.0)
        self.connection.close()


def fork(arguments: Sequence[str], environment: Mapping[str, str], folder: str, files: Sequence[int], output: int) -> Child:
    """Starts `runner.process.main(*arguments)` in a process of its own.

    Args:
        environment: All of it, but for where temporary files go.
        folder: There; it is removed when the process has ended, also if whoever asked for it was killed.
        files: Which it gets, as open files whose numbers precede the arguments.
        output: Where it prints.
    """
    try:
        connection = _connect()
    except OSError:  # a candidate has harmed it
        _known.clear()
        connection = _connect()
    environment = {**environment, "TMPDIR": folder}
    told = {"arguments": list(arguments), "environment": environment, "path": sys.path, "folder": os.getcwd()}
    request = json.dumps(told).encode()
    connection.sendall(NUMBER.pack(len(request)))
    socket.send_fds(connection, [b"f"], [output, *files])
    connection.sendall(request)
    return Child(NUMBER.unpack(_exactly(connection, NUMBER.size))[0], connection)


def _connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(start())
    return connection


_known: list[str] = []  # the address of this process's nursery
_held: list[Any] = []  # its folder, and its process where that is ours
_starting = threading.Lock()


def share(address: str) -> None:
    """Uses the nursery of another process of the same run."""
    _known[:] = [address]


def start(*, from_server: bool = False) -> str:
    """Starts the nursery of this process if there is none yet, and does not wait for it; returns its address.

    Args:
        from_server: Whether multiprocessing's fork server has imported, or soon will have, all that the nursery needs: it is
            forked from there, and imports nothing.
    """
    with _starting:
        if _known:
            return _known[0]
        folder = tempfile.TemporaryDirectory(prefix="gaugeblock-nursery-")
        address = str(Path(folder.name) / "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(64)
        if from_server:
            forked = multiprocessing.get_context("forkserver").Process(target=main, args=(listener,), daemon=True)
            threading.Thread(target=forked.start, daemon=True).start()  # which waits for the server
        else:
            paths = os.pathsep.join(filter(None, sys.path))
            process = subprocess.Popen(
                [sys.executable, "-m", "gaugeblock.conformance.engine.processes.nursery", str(listener.fileno())],
                pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths},
            )  # fmt: skip
            listener.close()
            _held.append(process)
        _held.append(folder)
        _known.append(address)
        return address


class Nursery:
    """Forks on demand, tells how each child ended, and ends what is left of it."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.children: dict[int, socket.socket] = {}  # keepers of candidates' processes, and who asked for them
        self.ending: dict[int, float] = {}  # those that have been told to end, and when patience with them ends
        self.woken, self.wakes = socket.socketpair()
        self.wakes.setblocking(False)
        signal.set_wakeup_fd(self.wakes.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Until the process that started it is gone, which is a signal."""
        while True:
            asked = {each.fileno(): pid for pid, each in self.children.items() if pid not in self.ending}
            watched: list[Any] = [self.listener, self.woken, *asked]
            for file in select.select(watched, [], [], END_SECONDS if self.ending else None)[0]:
                if file is self.listener:
                    self._fork(self.listener.accept()[0])
                elif file is self.woken:
                    self.woken.recv(4096)
                elif file in asked:  # whoever asked for it has closed the connection
                    self.ending[asked[file]] = time.monotonic() + END_SECONDS
                    os.kill(asked[file], signal.SIGTERM)
            self._reap()
            for pid in [each for each, when in self.ending.items() if time.monotonic() > when]:
                _kill_all(pid)  # its keeper was harmed
                self.ending[pid] = time.monotonic() + END_SECONDS

    def _fork(self, connection: socket.socket) -> None:
        try:
            length = NUMBER.unpack(_exactly(connection, NUMBER.size))[0]
            _, files, *_ = socket.recv_fds(connection, 1, MOST_FILES)
            request = json.loads(_exactly(connection, length))
        except (OSError, ValueError):
            connection.close()
            return
        own = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in [connection, self.listener, self.woken, self.wakes, *self.children.values()]:
                each.close()
            folder = request["environment"]["TMPDIR"]
            keeper.keep(own, lambda: _become(request, files), lambda: shutil.rmtree(folder, ignore_errors=True))
        for file in files:
            os.close(file)
        self.children[pid] = connection
        connection.sendall(NUMBER.pack(pid))

    def _reap(self) -> None:
        """Takes leave of every keeper that has ended; what a harmed one has left behind is ours too."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self.ending.pop(ended[0], None)
                connection = self.children.pop(ended[0], None)
                if connection is None:
                    continue
                for each in psutil.Process().children():
                    if each.pid not in self.children:
                        _kill_all(each.pid)
                with suppress(OSError):
                    connection.sendall(NUMBER.pack(os.waitstatus_to_exitcode(ended[1])))
                connection.close()


def _kill_all(pid: int) -> None:
    """Ends a process and all that come from it."""
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        for each in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            each.kill()


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise OSError("closed")
        found += part
    return found


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Turns a fork into a candidate's process; does not come back."""
    status = 1
    try:
        output, *others = files
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.close(nothing)
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None  # which is in the environment
        sys.path[:] = request["path"]
        with suppress(OSError):
            os.chdir(request["folder"])
        from gaugeblock.conformance.engine.processes import process

        process.main(*map(str, others), *request["arguments"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
        os._exit(status)


def main(listener: socket.socket) -> None:
    """The nursery's own process."""
    import ctypes

    os.setsid()
    inherited = {int(each) for each in os.listdir("/proc/self/fd")} - {0, 1, 2, listener.fileno()}
    for file in inherited:  # of the server: it ends when nobody holds them any more
        with suppress(OSError):
            os.close(file)
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from gaugeblock.conformance.engine.registry import contracts

    importlib.import_module("gaugeblock.conformance.engine.processes.perform")
    contracts()
    gc.freeze()  # else a fork's first collection would touch, and so copy, all that it shares with the others
    Nursery(listener).serve()


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
