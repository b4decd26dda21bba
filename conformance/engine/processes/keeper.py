"""Stands between the judge and a candidate's process: whatever comes from that process ends with it, and with the judge.

A fork of the nursery's; or, under torchrun, the script `python -I -S keeper.py JUDGE COMMAND ...`, since it must be there at
once: it imports nothing of ours. Linux gives it all processes whose parents are gone, though they have left session, group and
environment behind.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable

SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36
MOST_FILES = 256  # that it may have been handed


def command(judge: int) -> list[str]:
    """What is to be put before the command of a candidate's process."""
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(judge)]


def main(judge: str, *words: str) -> None:
    """Starts a command, and ends as it ends."""
    keep(int(judge), lambda: os.execv(words[0], words))


def keep(starter: int, become: Callable[[], None], leave: Callable[[], None] = lambda: None) -> None:
    """Forks, has the child call `become`, and ends as the child ends; does not come back.

    Args:
        starter: The process that this one is to end with.
        leave: Called when the child is gone, and all that came from it.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    libc.prctl(SET_CHILD_SUBREAPER, 1)
    if os.getppid() != starter:
        os._exit(1)  # it was gone before
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()  # so that what it does to its group does not meet its keeper
        become()
        os._exit(0)
    os.closerange(3, MOST_FILES)
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(child, signal.SIGUSR1))  # where it stands
    status = 1 << 8  # as of one that exits with 1
    try:
        status = wait_for(child)
    except SystemExit:
        pass
    finally:
        end_all()
        leave()
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


def wait_for(child: int) -> int:
    """The status with which it ended; all others that end meanwhile are forgotten."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            return status


def end_all() -> None:
    """Kills all that there are until there is none: those of the killed become its own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        for each in children():
            os.kill(each, signal.SIGKILL)  # not yet waited for, so it is still itself
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    """Processes whose parent this one is."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            continue  # it has ended
        if parent == os.getpid():
            found.append(int(name))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
