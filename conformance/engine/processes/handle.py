"""The judge's side of a candidate's process: starts it, asks it, and says what became of it when it does not answer."""

import atexit
import os
import re
import select
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import psutil
import torch

from gaugeblock.conformance.engine.frameworks import BadResult, Call, Raised
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.processes import nursery, wire
from gaugeblock.conformance.engine.processes.messages import Again, Describe, Group, Request, Settings
from gaugeblock.conformance.engine.processes.output import KEPT_OUTPUT, Output
from gaugeblock.conformance.engine.processes.perform import Conditions, Findings
from gaugeblock.conformance.engine.processes.wire import ANYONE, ARENA_BYTES, RING_BYTES, Arena, Dtypes, Impostor, Late, Link
from gaugeblock.conformance.engine.vocabulary import Tensors

CALL_SECONDS = 60.0  # until an answer must be there
IMPATIENT_SECONDS = 20.0  # the same for an implementation that was waited for in vain
START_SECONDS = 120.0  # the same for a process that imports torch and what it is to run, on a busy machine
LOAD_SECONDS = 120.0  # for files of a user's to be imported
TRACE_SECONDS = 0.5  # for a signalled process to write down where it stands
END_SECONDS = 5.0  # for a process that is killed, and all that come from it, to be gone
MOST_CHILDREN = 64  # processes that a candidate may have
KEPT_TEXT = 8 << 10  # characters of an error's message, or of its traceback
WITH_THE_NURSERY = "the process died with all that candidates' processes come from"
MOST_RESULTS = 10_000  # tensors that a call may return


class Lost(Violation):
    """A candidate's process is gone, or was killed: the case is not worth shrinking."""

    def __init__(
        self, message: str, status: Literal["crash", "timeout"], diagnosis: str = "", details: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message, diagnosis, details)
        self.status = status


class EngineError(RuntimeError):
    """The engine failed in a candidate's process: no word on the candidate."""


@dataclass(frozen=True)
class Answer:
    """What a call gave: results, copied, and findings."""

    results: Tensors
    findings: Findings


class Process:
    """One process of a candidate.

    Args:
        memory: Bytes of address space that it may take; None without limit.
        group: Where it is one of several ranks.
        link: To a process that an agent started elsewhere; None starts one here.
    """

    def __init__(self, device: str, memory: int | None, group: Group | None = None, link: Link | None = None) -> None:
        self.device, self.group = device, group
        self.number = self.base = self.end = 0
        self.output: Output | None = None
        self.process: nursery.Child | None = None  # the keeper of the candidate's process
        self.gone: socket.socket | None = None  # can be read when the keeper, and so the process, has ended
        self.itself: int | None = None  # the process, as a file: numbers are used again
        self.link = self._start() if link is None else link
        self.link.connection.settimeout(CALL_SECONDS)  # for one that does not read what it is sent
        self.link.send_pickle(Settings(device, memory, group))
        self.ready = False

    # ------------------------------------------------------------------------------------------------- asking
    def await_ready(self, deadline: float | None = None) -> None:
        """Waits until it has started.

        Raises:
            Lost: If it does not.
        """
        if self.ready:
            return
        message = self.receive(deadline or time.monotonic() + START_SECONDS, START_SECONDS)
        if "unready" in message:
            raise self.lost(f"the process did not start: {str(message['unready']).strip().splitlines()[-1]}", "crash")
        if self.link.peer:
            self.itself = os.pidfd_open(self.link.peer)
        self.ready = True

    def call(self, implementation: Implementation, call: Call, conditions: Conditions, most_bytes: int, **how: bool) -> Answer:
        """Asks for a call, as `send_call`, and waits for the answer."""
        self.await_ready()
        finish = self.send_call(implementation, call, conditions, most_bytes, **how)
        name = implementation.contract, implementation.name
        seconds = min(CALL_SECONDS, IMPATIENT_SECONDS) if name in _silent else CALL_SECONDS
        try:
            return finish(time.monotonic() + seconds, seconds)
        except Lost as lost:
            if lost.status == "timeout":
                _silent.add(name)
            raise

    def send_call(
        self,
        implementation: Implementation,
        call: Call,
        conditions: Conditions,
        most_bytes: int,
        *,
        same_memory: bool = False,
        write_back: bool = False,
    ) -> Callable[[float, float], Answer]:
        """Asks for a call.

        Args:
            same_memory: The inputs lie where those of the call before lay.
            write_back: The memory of the inputs and of the cotangents is changed as the candidate changes it.

        Returns:
            A function of a deadline, and of how many seconds that are, that waits for the answer.
        """
        start = self.base if same_memory else self._next_base()
        inputs, end = self.link.sent.place(call.inputs, start)
        inputs_end, cotangents = end - start, None
        if call.cotangents is not None:
            cotangents, end = self.link.sent.place(call.cotangents, end)
        self.base, self.end = start, end
        self.number += 1
        bare = replace(call, inputs={}, cotangents=None)
        request = Request(
            self.number, implementation, inputs, cotangents, bare, conditions, most_bytes, (start, end) if write_back else None
        )
        before = bytes(self.link.sent.memory[start:end]) if write_back else b""
        self._send(request, (start, end))
        number = self.number

        def finish(deadline: float, seconds: float) -> Answer:
            message = self.receive(deadline, seconds, number)
            if write_back:
                self.link.receive_returned(start, end, deadline, self.gone)
                self.link.sent.write_back(call.inputs, inputs, before[:inputs_end])
                self.link.sent.write_back(call.cotangents or {}, cotangents or {}, before[inputs_end:])
            return self.answer_of(message, most_bytes)

        return finish

    def again(self, number: int, most_bytes: int) -> Tensors:
        """What now stands in the memory of the results of call `number`."""
        self._send(Again(number, most_bytes), (0, 0))
        message = self.receive(time.monotonic() + CALL_SECONDS, CALL_SECONDS, number)
        return self.answer_of(message | {"findings": {}}, most_bytes).results

    def describe(self, asked: Describe) -> dict[str, Any]:
        """What files and modules register, or what is wrong with them; not yet checked."""
        self.await_ready()
        self._send(asked, (0, 0))
        return self.receive(time.monotonic() + LOAD_SECONDS, LOAD_SECONDS)

    def _send(self, request: Any, used: tuple[int, int]) -> None:
        try:
            self.link.send_pickle(request, used)
        except wire.Closed:
            raise self.lost(*self._how_it_ended()) from None

    def _next_base(self) -> int:
        return self.end if self.end < RING_BYTES else 0

    # ------------------------------------------------------------------------------------------------ answers
    def receive(self, deadline: float, seconds: float, number: int = 0) -> dict[str, Any]:
        """The next message, which answers the call of that number.

        Raises:
            Lost: If there is none; the process is gone then.
        """
        try:
            message = self._receive(deadline)
        except wire.Closed:
            raise self.lost(*self._how_it_ended()) from None
        except Late:
            trace = self.trace()
            raise self.lost(f"no answer within {seconds:.0f} s", "timeout", place_in(trace), candidates_part(trace)) from None
        except Impostor:
            raise self.lost("another process has answered in the place of the candidate's: it was forked", "crash") from None
        except wire.BadMessage as error:
            raise self.lost(f"the process sent {error}", "crash") from None
        if not isinstance(message, dict):
            raise self.lost("the process sent no answer", "crash")
        if message.get("number", 0) != number:
            raise self.lost("the process sent an answer to no call, or to another one", "crash")
        return message

    def _receive(self, deadline: float) -> Any:
        late = False
        while not late and not self.has_answer(min(1.0, max(0.0, deadline - time.monotonic()))):
            late = time.monotonic() > deadline
            if self.process is not None and len(children_of(self.process.pid)) > MOST_CHILDREN + 1:  # it is one of them
                raise self.lost(f"the candidate has more than {MOST_CHILDREN} processes", "crash")
        return self.link.receive_json(deadline, self.gone)

    def answer_of(self, message: dict[str, Any], most_bytes: int) -> Answer:
        """A message as an answer.

        Raises:
            BadResult, Raised: As the candidate did.
            Lost: If it is none.
        """
        if "bad_result" in message:
            raise BadResult(str(message["bad_result"])[:KEPT_TEXT])
        if "engine_error" in message:
            raise EngineError(str(message["engine_error"]))
        try:
            if "raised" in message:
                kinds, text, where = message["raised"]
                raise Raised([str(each)[:KEPT_TEXT] for each in kinds], str(text)[:KEPT_TEXT], str(where)[-KEPT_TEXT:])
            known = {each.name for each in fields(Findings)}
            findings = Findings(**{name: value for name, value in message["findings"].items() if name in known})
            return Answer(self._results(message["results"], most_bytes), _checked(findings))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
            raise self.lost(f"the process sent no results: {type(error).__name__}", "crash") from None  # not the engine's words

    def _results(self, described: Mapping[str, Any], most_bytes: int) -> Tensors:
        if len(described) > MOST_RESULTS:
            raise BadResult(f"{len(described)} results")
        results = {}
        for key, each in described.items():
            dtype, shape, start = Dtypes[each["dtype"]], torch.Size(each["shape"]), each["start"]
            if min(shape, default=0) < 0:
                raise ValueError("a negative size")
            if start is None:
                raise BadResult(f"{str(key)[:KEPT_TEXT]} has shape {tuple(shape)}: together, the results are too large")
            if start < 0 or start + shape.numel() * dtype.itemsize > min(ARENA_BYTES, most_bytes + 64 * len(described)):
                raise ValueError("beyond the memory of results")
            results[str(key)] = self.link.received.flat(start, shape.numel(), dtype).view(shape).clone()
        return results

    # ------------------------------------------------------------------------------------- beginning and ending
    def _start(self) -> Link:
        ours, theirs = socket.socketpair()
        sent, received = Arena(), Arena()
        self.traces = os.memfd_create("gaugeblock-traces")
        self.folder = tempfile.TemporaryDirectory(prefix="gaugeblock-", ignore_cleanup_errors=True)
        reading, writing = os.pipe()
        assert sent.file is not None and received.file is not None  # shared
        files = [theirs.fileno(), sent.file, received.file, self.traces]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        self.process = nursery.fork((), environment, self.folder.name, files, writing)
        theirs.close()
        for each in (writing, *files[1:3]):
            os.close(each)  # what is mapped stays
        self.output = Output(reading)
        self.gone = self.process.connection
        atexit.register(self.stop)
        return Link(ours, sent, received, peer=ANYONE)

    def has_answer(self, seconds: float) -> bool:
        """Whether there is something to receive, or the process is gone; waits for so long."""
        files: list[Any] = [self.link.connection] if self.gone is None else [self.link.connection, self.gone]
        return bool(select.select(files, [], [], seconds)[0])

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.link.connection.fileno() >= 0

    def printed(self) -> str:
        """What it has printed since this was last asked."""
        return self.output.taken(ended=not self.alive) if self.output else ""

    def trace(self) -> str:
        """Where it stands, as `faulthandler` writes it."""
        if self.process is None:
            return ""
        before = len(self._traces())
        try:
            os.kill(self.process.pid, signal.SIGUSR1)
        except ProcessLookupError:
            return ""
        time.sleep(TRACE_SECONDS)
        return self._traces()[before:]

    def _traces(self) -> str:
        size = min(os.fstat(self.traces).st_size, KEPT_OUTPUT)
        return os.pread(self.traces, size, 0).decode(errors="replace")

    def _how_it_ended(self) -> tuple[str, Literal["crash"], str, tuple[str, ...]]:
        if self.process is None:
            return "the process closed its connection", "crash", "", ()
        code = self.process.poll(END_SECONDS)
        if code is None:
            return "the process closed its connection", "crash", "", ()
        if code == nursery.GONE:
            return WITH_THE_NURSERY, "crash", "", ()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        trace = self._traces()
        return f"the process died ({how})", "crash", place_in(trace), candidates_part(trace)

    def lost(self, message: str, status: Literal["crash", "timeout"], diagnosis: str = "", details: tuple[str, ...] = ()) -> Lost:
        """The process is ended, and this is why."""
        self.stop()
        return Lost(message, status, diagnosis, details)

    def stop(self) -> None:
        """Ends it, and whatever it has started."""
        self.link.close()
        if self.gone is None or self.process is None:
            return
        if self.itself is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.itself, signal.SIGKILL)
            os.close(self.itself)
        self.process.end()
        os.close(self.traces)
        self.gone = self.itself = None
        self.folder.cleanup()
        atexit.unregister(self.stop)


_silent: set[tuple[str, str]] = set()  # implementations that were waited for in vain


def children_of(pid: int) -> list[psutil.Process]:
    """All processes that come from one."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _checked(findings: Findings) -> Findings:
    """The same if it is what it should be: what comes from a candidate's process is not believed."""
    texts = (*findings.races, *findings.unbatched, *findings.settings_changed, *findings.launches)
    counts = (*findings.launches.values(), findings.collectives, findings.sent_bytes)
    if not all(isinstance(each, str) for each in texts) or not all(isinstance(each, int) for each in counts):
        raise ValueError("findings of other types")
    return findings


def candidates_part(trace: str) -> tuple[str, ...]:
    """A stack without the engine's frames, which end it."""
    own = trace.strip().partition("conformance/engine/calls.py")[0].rpartition("\n")[0] or trace.strip()
    return (own,) if own else ()


def place_in(trace: str) -> str:
    """Where a process stands, from what `faulthandler` wrote: the call into torch, and the line that made it."""
    frames = re.findall(r'File "(.*?)", line (\d+) in (\S+)', trace)
    if not frames:
        return ""
    own = next((each for each in frames if "/torch/" not in each[0]), frames[-1])
    inner = [function for file, _, function in frames[: frames.index(own)] if function not in ("wrapper",)]
    waits = f"waits in {inner[-1]}, called" if inner else "stands"
    return f"{waits} in {own[2]} ({os.path.basename(own[0])}:{own[1]})"
