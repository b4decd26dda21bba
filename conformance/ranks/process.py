"""One rank: a process that waits for tasks, puts the candidate through a property together with the other ranks, and answers.

Started by `agent.py` as `python -m gaugeblock.conformance.ranks.process HOST PORT GENERATION RANK`. All that passes between the
leader and the ranks lies in a key-value store (`torch.distributed.TCPStore`) under keys that begin with the generation.
"""

import faulthandler
import os
import pickle
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

FOREVER = timedelta(days=7)


@dataclass(frozen=True)
class Settings:
    """What every rank must know before it can unpickle a task.

    Attributes:
        size: Ranks of this generation.
        device: "cpu" or "cuda".
        path: The leader's `sys.path`.
        sources: Candidate files and modules, in the order in which they were loaded.
    """

    size: int
    device: str
    path: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A property of a case, on the first `size` ranks.

    Attributes:
        implementation: Itself, or, where it was registered, the names of its contract and itself.
    """

    implementation: Any
    dtype: str
    device: str
    property: str
    case: Any
    size: int


def connect(host: str, port: int) -> Any:
    """A client of the store."""
    import torch.distributed as dist

    return dist.TCPStore(host, port, is_master=False, timeout=FOREVER)


def main(host: str, port: str, generation: str, rank: str) -> None:
    """Serves until the store is gone or the agent kills the process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # where it waits, though it waits in C++
    _die_with_parent()
    store = connect(host, int(port))
    settings: Settings = pickle.loads(store.get(f"{generation}/settings"))
    sys.path[:] = settings.path
    try:
        serve = _prepare(store, connect(host, int(port)), settings, generation, int(rank))
    except BaseException:
        store.set(f"{generation}/unready/{rank}", traceback.format_exc())
        raise
    store.set(f"{generation}/ready/{rank}", b"")
    number = 0
    while True:
        key = f"{generation}/task/{rank}/{number}"
        store.wait([key], FOREVER)
        answer = serve(pickle.loads(store.get(key)), number)
        store.set(f"{generation}/answer/{rank}/{number}", pickle.dumps(answer))
        number += 1


def _prepare(store: Any, group_store: Any, settings: Settings, generation: str, rank: int) -> Any:
    """Joins the ranks' group and loads the candidates; returns what serves a task."""
    import torch
    import torch.distributed as dist

    from gaugeblock.conformance.devices import set_up_process

    set_up_process()
    torch.set_num_threads(1)
    if settings.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    from gaugeblock.conformance.judge import Violation
    from gaugeblock.conformance.properties import find_property
    from gaugeblock.conformance.ranks.world import Rank
    from gaugeblock.conformance.registry import Implementation, RegistrationError, implementations, load_candidates
    from gaugeblock.conformance.trial import Ledger, Subject, Trial, violation_of

    backend = "gloo" if settings.device == "cpu" else "cpu:gloo,cuda:nccl"
    prefixed = dist.PrefixStore(f"{generation}/group", group_store)
    dist.init_process_group(backend, store=prefixed, rank=rank, world_size=settings.size)
    meshes, groups = {}, {}
    for size in range(1, settings.size + 1):  # every rank takes part in making every group, also those without it
        groups[size] = dist.new_group(list(range(size)), backend="gloo")
        meshes[size] = dist.DeviceMesh(settings.device, list(range(size)), mesh_dim_names=("ranks",))
    for source in settings.sources:
        with suppress(RegistrationError):  # a file that is gone since: only what it registered will be missed
            load_candidates(source)

    def serve(task: Task, number: int) -> tuple[Any, Any]:
        def report(what: str, text: str = "") -> None:
            store.set(f"{generation}/{what}/{rank}/{number}", text)

        named = task.implementation
        if not isinstance(named, Implementation):
            contract, name = named
            found = {each.name: each for each in implementations(contract)}
            if name not in found:
                return Violation(f"{contract}: the ranks could not load {name!r}"), Ledger()
            named = found[name]
        subject, ledger = Subject(named, task.dtype, task.device), Ledger()
        world = Rank(meshes[task.size], groups[task.size], report)
        violation = violation_of(find_property(task.property), Trial(subject, task.case, ledger, world))
        return world.settle(violation), ledger

    return serve


def _die_with_parent() -> None:
    """On Linux: no rank outlives the process that started it, however that ended."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main(*sys.argv[1:])
