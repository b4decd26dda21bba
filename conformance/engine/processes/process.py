"""A candidate's process: loads the implementations that it is asked for, calls them, and gives back results and findings.

Forked by `nursery.py`, with the numbers of four open files, `CONTROL INPUTS RESULTS TRACES`; or, for a rank of torchrun's, begun
by `agent.py` as `python -m gaugeblock.conformance.engine.processes.process HOST PORT NAME`, of the judge's door.
"""

import faulthandler
import os
import resource
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from gaugeblock.conformance.engine.processes.messages import Again, Describe, Group, Request, Settings
from gaugeblock.conformance.engine.processes.wire import Arena, Closed, Dtypes, Link

KEPT = 4  # calls whose results stay in the candidate's own memory, to see what becomes of them


def main(*arguments: str) -> None:
    """Serves until the judge is gone."""
    _die_with_parent()
    if len(arguments) == 4:
        control, inputs, results, traces = map(int, arguments)
        faulthandler.enable(traces)
        faulthandler.register(signal.SIGUSR1, traces, all_threads=False)  # where it stands, though it stands in C++
        link = Link(socket.socket(fileno=control), Arena(results), Arena(inputs))
    else:
        from gaugeblock.conformance.engine.processes.door import knock

        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        link = knock(*arguments)
    settings: Settings = link.receive_pickle()
    try:
        server = Server(link, settings)
    except BaseException:
        link.send_json({"unready": traceback.format_exc()})
        raise
    link.send_json({"ready": os.getpid()})
    with suppress(Closed):
        while True:
            server.answer(link.receive_pickle())


class Server:
    """Answers one request after the other."""

    def __init__(self, link: Link, settings: Settings) -> None:
        from gaugeblock.conformance.engine.devices import set_up_process

        set_up_process()
        self.link, self.settings = link, settings
        self.kept: deque[tuple[int, Any]] = deque(maxlen=KEPT)
        if settings.group is not None:
            _join(settings.group, settings.device)
        self.most = None if settings.memory is None else settings.memory + _address_space()
        self.was_far = False
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def answer(self, request: Any) -> None:
        """Does what is asked; whatever a candidate raises is an answer."""
        from gaugeblock.conformance.engine.frameworks import UNSAID, BadResult, Raised

        used = 0, 0
        try:
            match request:
                case Request():
                    message, used = self._call(request)
                case Again():
                    message, used = self._results(dict(self.kept)[request.number], request.most_bytes)
                case Describe():
                    message = _describe(request)
        except BadResult as error:
            message = {"bad_result": str(error)}
        except Raised as error:
            message = {"raised": [error.kinds, error.message, error.where]}
        except BaseException as error:
            raised = Raised.of(error)
            # from a signal's handler, which may strike while the traceback is written too; an interrupt: nobody else's doing
            if raised.place or raised.where.startswith(UNSAID) or not isinstance(error, Exception):
                message = {"raised": [raised.kinds, raised.message, raised.where]}
            else:
                message = {"engine_error": raised.where}
        for each in (sys.stdout, sys.stderr):
            with suppress(Exception):  # closed, or replaced by something else
                each.flush()
        self.link.send_json(message | {"number": getattr(request, "number", 0)}, used)
        if isinstance(request, Request) and request.written:
            self.link.return_arena(*request.written)

    def _call(self, request: Request) -> tuple[dict[str, Any], tuple[int, int]]:
        from gaugeblock.conformance.engine.processes.perform import perform

        device = self.settings.device
        self._limit_memory(far=any(each.far for each in request.inputs.values()))
        placed = {**request.inputs, **{f"cotangent/{key}": each for key, each in (request.cotangents or {}).items()}}
        tensors = self.link.received.tensors(placed, device)
        inputs = {key: tensors[key] for key in request.inputs}
        cotangents = None if request.cotangents is None else {key: tensors[f"cotangent/{key}"] for key in request.cotangents}
        call = replace(request.call, inputs=inputs, cotangents=cotangents)
        mesh_of = _mesh if self.settings.group else None
        try:
            results, findings = perform(request.implementation, call, request.conditions, mesh_of)
        finally:
            if device != "cpu" and request.written:
                self.link.received.update(tensors, placed)
        self.kept.append((request.number, results))
        message, used = self._results(results, request.most_bytes)
        return message | {"findings": asdict(findings)}, used

    def _limit_memory(self, *, far: bool) -> None:
        """A far view is tens of GiB of address space and a few pages; what keeps one after its call is not to suffer for it."""
        if self.settings.memory is not None and self.most is not None:
            if self.was_far and not far:
                self.most = max(self.most, self.settings.memory + _address_space())
            self.was_far = far
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (hard if far else self.most, hard))

    def _results(self, results: Mapping[str, Any], most_bytes: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """Contiguous copies in the arena, and where each is; only shapes where that would be too much.

        Raises:
            BadResult: If a result cannot be read.
        """
        import torch

        from gaugeblock.conformance.engine.frameworks import BadResult

        key = ""
        try:
            fitting = sum(each.numel() * each.element_size() for each in results.values()) <= most_bytes
            copies = {}
            for key, each in results.items():
                held = each.detach().cpu() if fitting else torch.empty(0, dtype=each.dtype)
                copies[key] = held.clone(memory_format=torch.contiguous_format)
                Dtypes[str(each.dtype).removeprefix("torch.")]
        except Exception as error:  # sparse, quantized, without memory, of sizes beyond counting
            raise BadResult(f"{key or 'a result'} cannot be read: {type(error).__name__}: {error}") from error
        placed, end = self.link.sent.place(copies, 0)
        described = {
            key: {"dtype": placed[key].dtype, "shape": list(each.shape), "start": placed[key].storage[0] if fitting else None}
            for key, each in results.items()
        }
        return {"results": described}, (0, end)


def _describe(asked: Describe) -> dict[str, Any]:
    """What is registered, as plain data; an error is one line for the user."""
    from gaugeblock.conformance.engine.registry import RegistrationError, claims_of, load_entry_points

    rows = []
    try:
        loaded = load_several(asked) if asked.sources else load_entry_points()
        for source, implementations in loaded:
            for each in implementations:
                where = str(Path(source).resolve()) if source.endswith(".py") else source
                rows.append({"source": where, "contract": each.contract, "name": each.name, "claims": claims_of(each)})
    except RegistrationError as error:
        return {"wrong": str(error)}
    return {"rows": rows}


def load_several(asked: Describe) -> list[tuple[str, list[Any]]]:
    """Runs files that lie side by side, or imports modules, and returns what each registers.

    What a neighbour registers is its own where it is one of the sources, whoever imported it first.

    Raises:
        RegistrationError: If one cannot be read, run or imported, or registers nothing.
    """
    from gaugeblock.conformance.engine.registry import registered_by_file, registers_nothing, run_candidate

    files = {os.path.realpath(each): each for each in asked.sources if each.endswith(".py")}
    others = {os.path.realpath(each) for each in asked.others}
    found: dict[str, list[Any]] = {each: [] for each in asked.sources}
    for source in asked.sources:
        before = set(registered_by_file())
        run_candidate(source)
        for key, (implementation, file) in registered_by_file().items():
            if key not in before and file not in others:
                found[files.get(file, source)].append(implementation)
    empty = [source for source, rows in found.items() if not rows and source not in asked.optional]
    if empty:
        raise registers_nothing(empty[0])
    return list(found.items())


def _join(group: Group, device: str) -> None:
    """Takes part in making the process groups, also in those that it is not in."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if device != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", group.rank)) % torch.accelerator.device_count())
    store = dist.PrefixStore(f"{group.generation}/group", dist.TCPStore(group.host, group.port, is_master=False))
    backend = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backend, store=store, rank=group.rank, world_size=group.size)
    _meshes.update(
        {size: dist.DeviceMesh(device, list(range(size)), mesh_dim_names=("ranks",)) for size in range(1, group.size + 1)}
    )


_meshes: dict[int, Any] = {}


def _mesh(size: int) -> Any:
    return _meshes[size]


@cache
def _page() -> int:
    return os.sysconf("SC_PAGE_SIZE")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * _page()


def _die_with_parent() -> None:
    """On Linux: it does not outlive the process that started it, however that ended."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main(*sys.argv[1:])
