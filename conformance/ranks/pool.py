"""The leader's side of the ranks: hands a property and a case to them, waits for their answers, and says what became of them.

The processes start once and serve every case; only when a rank is lost (it died, or waits for ever) are all of them replaced.
"""

import atexit
import os
import pickle
import re
import signal
import sys
import time
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from gaugeblock.conformance.cases import Case
from gaugeblock.conformance.devices import RANKS
from gaugeblock.conformance.judge import Violation
from gaugeblock.conformance.ranks import agent
from gaugeblock.conformance.ranks.process import Settings, Task, connect
from gaugeblock.conformance.registry import is_registered, loaded_sources

if TYPE_CHECKING:
    from gaugeblock.conformance.trial import Ledger, Property, Subject

START_SECONDS = 90.0  # to import torch and the candidates on a busy machine
PATIENCE_SECONDS = 20.0  # without any rank making a call, until all are taken to be stuck
IMPATIENCE_SECONDS = 6.0  # the same for an implementation that was stuck before
GRACE_SECONDS = 3.0  # for the other ranks to come back after the implementation raised in one
POLL_SECONDS = 0.001


class RanksLost(Violation):
    """A rank died or waits for ever: the processes are gone, and the case is not worth shrinking."""


class Pool:
    """Rank processes, started when first needed."""

    def __init__(self) -> None:
        self.generation, self.size, self.device = 0, 0, ""
        self.sources: tuple[str, ...] = ()
        self.stuck: set[tuple[str, str]] = set()
        self.numbers: list[int] = []
        self.store: Any = None
        self.most: int | None = None  # as many ranks as torchrun started; on one machine, as many as are asked for

    def check(self, subject: "Subject", prop: "Property", case: Case, size: int) -> tuple[Violation | None, "Ledger"]:
        """A property of one case on `size` ranks: what they agree on, and rank 0's ledger."""
        from gaugeblock.conformance.trial import Ledger

        implementation = subject.implementation
        name = implementation.contract, implementation.name
        try:
            self._prepare(max(implementation.world_sizes), subject.device)
            task = Task(
                name if is_registered(implementation) else implementation, subject.dtype, subject.device, prop.name, case, size
            )
            answers = self._ask(task, IMPATIENCE_SECONDS if name in self.stuck else PATIENCE_SECONDS)
        except RanksLost as lost:
            self.stuck.add(name)
            self.size = 0  # the next case starts a new generation
            return lost, Ledger()
        violations = [violation for violation, _ in answers if violation is not None]
        return (violations[0] if violations else None), answers[0][1]

    def stop(self) -> None:
        """Ends the processes."""
        if self.store is not None:
            self.store.set("over", b"")

    def _prepare(self, size: int, device: str) -> None:
        sources = loaded_sources()
        if self.size >= min(size, self.most or size) and (device, sources) == (self.device, self.sources):
            return
        if self.store is None:
            self._connect()
        self.size, self.device, self.sources = self.most or size, device, sources
        if not self.most:
            self._grow(size)
        self.generation += 1
        self.numbers = [0] * self.size
        settings = Settings(self.size, device, tuple(sys.path), sources)
        self.store.set(f"{self.generation}/settings", pickle.dumps(settings))
        self.store.set(f"{self.generation}/size", str(self.size))
        self.store.set("generation", str(self.generation))
        ready = [f"{self.generation}/ready/{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + START_SECONDS
        while not self.store.check(ready):
            self._raise_if_lost(range(self.size))
            for rank in range(self.size):
                if self.store.check([f"{self.generation}/unready/{rank}"]):
                    text = self.store.get(f"{self.generation}/unready/{rank}").decode()
                    raise RanksLost(f"rank {rank} did not start: {text.strip().splitlines()[-1]}", "", (text,))
            if time.monotonic() > deadline:
                raise RanksLost(f"the ranks did not start within {START_SECONDS:.0f} s")
            time.sleep(0.02)

    def _connect(self) -> None:
        import torch.distributed as dist

        if RANKS in os.environ:
            host, port, size = os.environ[RANKS].rsplit(":", 2)
            self.store, self.most = connect(host, int(port)), int(size)
            return
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.agents = 0
        atexit.register(self.stop)

    def _grow(self, size: int) -> None:
        """One agent keeps the ranks that earlier ones do not."""
        if size > self.agents:
            agent.start_thread("127.0.0.1", self.store.port, range(self.agents, size))
            self.agents = size

    def _ask(self, task: Task, patience: float) -> list[tuple[Violation | None, "Ledger"]]:
        ranks, numbers = range(task.size), self.numbers[: task.size]
        for rank in ranks:
            self.store.set(f"{self.generation}/task/{rank}/{numbers[rank]}", pickle.dumps(task))
            self.numbers[rank] += 1
        answers = [self._key("answer", rank) for rank in ranks]
        looked, seen, since = time.monotonic(), "", time.monotonic()
        raised: dict[int, float] = {}
        while not self.store.check(answers):
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if now - looked < agent.POLL_SECONDS:
                continue
            looked = now
            self._raise_if_lost(ranks)
            progress = " ".join(self._read("progress", rank) for rank in ranks)
            if progress != seen:
                seen, since = progress, now
            for rank in ranks:
                if self._read("raised", rank):
                    raised.setdefault(rank, now)
                else:
                    raised.pop(rank, None)
            if raised and now - min(raised.values()) > GRACE_SECONDS:
                self._give_up(ranks, min(raised, key=lambda each: raised[each]))
            if now - since > patience:
                self._give_up(ranks, None, patience)
        return [pickle.loads(self.store.get(key)) for key in answers]

    def _key(self, what: str, rank: int) -> str:
        return f"{self.generation}/{what}/{rank}/{self.numbers[rank] - 1}"

    def _read(self, what: str, rank: int) -> str:
        key = self._key(what, rank)
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _raise_if_lost(self, ranks: range) -> None:
        for rank in ranks:
            if self.store.check([f"{self.generation}/died/{rank}"]):
                code, _, errors = self.store.get(f"{self.generation}/died/{rank}").decode().partition("\n")
                how = signal.Signals(-int(code)).name if int(code) < 0 else f"exit status {code}"
                raise RanksLost(f"rank {rank} died ({how})", _place(errors), (errors.strip(),) if errors.strip() else ())

    def _give_up(self, ranks: range, culprit: int | None, patience: float = 0.0) -> None:
        """Asks every rank where it stands, and raises what is known."""
        self.store.set(f"{self.generation}/trace", b"")
        traced = [f"{self.generation}/traced/{rank}" for rank in ranks]
        deadline = time.monotonic() + 5 + len(ranks) * agent.TRACE_SECONDS
        while not self.store.check(traced) and time.monotonic() < deadline:
            time.sleep(0.05)
        traces = {rank: self.store.get(key).decode() for rank, key in zip(ranks, traced, strict=True) if self.store.check([key])}
        places = "; ".join(f"rank {rank} {_place(trace)}" for rank, trace in traces.items())
        details = tuple(f"rank {rank} when it was given up:\n{_candidates_part(trace)}" for rank, trace in traces.items())
        if culprit is None:
            raise RanksLost(f"the ranks wait for ever: none went on for {patience:.0f} s", places, details)
        error = self._read("raised", culprit).strip()
        message = f"rank {culprit} raised {error.splitlines()[-1]}, and the others wait for it for ever"
        raise RanksLost(message, places, (f"rank {culprit}:\n{error}", *details))


@cache
def pool() -> Pool:
    """The ranks of this process."""
    return Pool()


def _candidates_part(trace: str) -> str:
    """A stack without the engine's frames, which end it."""
    return trace.strip().partition("conformance/contract.py")[0].rpartition("\n")[0]


def _place(trace: str) -> str:
    """Where a rank stands, from what `faulthandler` wrote: the call into torch, and the line that made it."""
    frames = re.findall(r'File "(.*?)", line (\d+) in (\w+)', trace)
    if not frames:
        return ""
    own = next((each for each in frames if "/torch/" not in each[0]), frames[-1])
    if own[0].endswith("ranks/world.py"):
        return "came back and waits for the others"
    inner = [function for file, _, function in frames[: frames.index(own)] if function not in ("wrapper",)]
    waits = f"waits in {inner[-1]}, called" if inner else "stands"
    return f"{waits} in {own[2]} ({os.path.basename(own[0])}:{own[1]})"
