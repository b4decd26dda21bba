"""Implementations on several devices: what each rank gets and gives, and how a rank that is lost is told.

Each rank is a process of the candidate; all get the same call, each with its shard of the inputs, and what they return is put
together here.
"""

import os
import signal
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from gaugeblock.conformance.engine.budget.oracle import GRADIENT
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.devices import RANKS
from gaugeblock.conformance.engine.frameworks import BadResult, Call, Raised
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.judging.judge import Violation
from gaugeblock.conformance.engine.processes.door import Door
from gaugeblock.conformance.engine.processes.handle import START_SECONDS, Answer, Lost, Process, candidates_part, place_in
from gaugeblock.conformance.engine.processes.messages import Group
from gaugeblock.conformance.engine.processes.perform import Conditions, Findings
from gaugeblock.conformance.engine.processes.shards import alike, part, whole
from gaugeblock.conformance.engine.shardings import Sharding, split_along
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors

PATIENCE_SECONDS = 20.0  # without any rank coming back, until all are taken to be stuck
IMPATIENCE_SECONDS = 6.0  # the same for an implementation that was stuck before
GRACE_SECONDS = 3.0  # for the other ranks to come back after one has raised
POLL_SECONDS = 0.02


class Ranks:
    """The processes of one generation of ranks; lost together."""

    def __init__(self, device: str, size: int, memory: int | None) -> None:
        self.size = size
        self.meeting = _meeting()
        self.generation = self.meeting.next_generation()
        self.processes = self.meeting.start(device, size, memory, self.generation)
        deadline = time.monotonic() + START_SECONDS
        for rank, each in enumerate(self.processes):
            try:
                each.await_ready(deadline)
            except Lost as lost:
                raise self._lost(f"rank {rank}: {lost.message}", lost.status, lost.diagnosis, lost.details) from None

    @property
    def alive(self) -> bool:
        """Whether all can be asked."""
        return all(each.alive for each in self.processes)

    @property
    def number(self) -> int:
        """Of the last call."""
        return self.processes[0].number

    def call(
        self,
        contract: Contract,
        sharding: Sharding,
        parameters: Parameters,
        implementation: Implementation,
        call: Call,
        conditions: Conditions,
        most_bytes: int,
        **how: bool,
    ) -> Answer:
        """What the first `conditions.world_size` ranks return, put together.

        Raises:
            Raised, BadResult: As a rank did.
            Lost: If a rank died, or all wait for ever.
            Violation: If what they return does not fit together.
        """
        ranks = self.processes[: conditions.world_size]
        shards = [_shard(contract, sharding, parameters, call, rank, len(ranks)) for rank in range(len(ranks))]
        finish = [
            process.send_call(implementation, shard, conditions, most_bytes, **how)
            for process, shard in zip(ranks, shards, strict=True)
        ]
        answers = self._gather(ranks, finish, f"{implementation.contract} {implementation.name}")
        return Answer(_whole(contract, sharding, parameters, [each.results for each in answers]), _all_findings(answers))

    def again(
        self, contract: Contract, sharding: Sharding, parameters: Parameters, size: int, number: int, most_bytes: int
    ) -> Tensors:
        """What now stands in the memory of the results of an earlier call."""
        last = self.number
        parts = [each.again(each.number - (last - number), most_bytes) for each in self.processes[:size]]
        return _whole(contract, sharding, parameters, parts)

    def printed(self) -> str:
        """What the ranks have printed since this was last asked."""
        texts = [(rank, each.printed()) for rank, each in enumerate(self.processes)]
        return "\n".join(f"rank {rank}:\n{text}" for rank, text in texts if text.strip())

    def stop(self) -> None:
        """Ends the processes."""
        for each in self.processes:
            each.stop()

    def _gather(self, ranks: list[Process], finish: list[Any], name: str) -> list[Answer]:
        patience = IMPATIENCE_SECONDS if name in _stuck else PATIENCE_SECONDS
        answers: dict[int, Answer] = {}
        raised: dict[int, Exception] = {}
        since, first_raised = time.monotonic(), 0.0
        while len(answers) + len(raised) < len(ranks):
            for rank, process in enumerate(ranks):
                if rank in answers or rank in raised or not process.has_answer(POLL_SECONDS / len(ranks)):
                    continue
                try:
                    answers[rank] = finish[rank](time.monotonic() + patience, patience)
                except (Raised, BadResult) as error:
                    raised[rank] = error
                    first_raised = first_raised or time.monotonic()
                except Lost as lost:
                    _stuck.add(name)
                    raise self._lost(f"rank {rank}: {lost.message}", lost.status, lost.diagnosis, lost.details) from None
                since = time.monotonic()
            now = time.monotonic()
            self.meeting.raise_if_died(self, ranks)
            late = len(answers) + len(raised) < len(ranks)
            if late and raised and now - first_raised > GRACE_SECONDS:
                _stuck.add(name)
                self._give_up(ranks, answers, raised, patience)
            if late and now - since > patience:
                _stuck.add(name)
                self._give_up(ranks, answers, {}, patience)
        if raised:
            raise raised[min(raised)]
        return [answers[rank] for rank in range(len(ranks))]

    def _give_up(
        self, ranks: list[Process], answers: Mapping[int, Answer], raised: Mapping[int, Exception], patience: float
    ) -> None:
        """Asks every rank that has not come back where it stands, and raises what is known."""
        missing = [rank for rank in range(len(ranks)) if rank not in answers and rank not in raised]
        traces = self.meeting.traces(self, ranks, missing)
        places = [f"rank {rank} {place_in(traces[rank])}" for rank in missing]
        back = [*answers, *(rank for rank, error in raised.items() if isinstance(error, BadResult))]
        places += [f"rank {rank} came back and waits for the others" for rank in back]
        details = tuple(f"rank {rank} when it was given up:\n{''.join(candidates_part(traces[rank]))}" for rank in missing)
        diagnosis = "; ".join(sorted(places))
        if not raised:
            raise self._lost(f"the ranks wait for ever: none went on for {patience:.0f} s", "timeout", diagnosis, details)
        culprit = min(raised)
        error = raised[culprit]
        told = f"rank {culprit}:\n{error.where}" if isinstance(error, Raised) else f"rank {culprit}: {error}"
        message = f"rank {culprit} {_what(error)}, and the others wait for it for ever"
        raise self._lost(message, "timeout", diagnosis, (told, *details))

    def _lost(self, message: str, status: Any, diagnosis: str = "", details: tuple[str, ...] = ()) -> Lost:
        self.stop()
        return Lost(message, status, diagnosis, details)


_stuck: set[str] = set()  # implementations that were waited for in vain


class LocalMeeting:
    """Ranks of this machine, started by the judge itself."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        self.generation = 0

    def next_generation(self) -> int:
        """A number for the next processes."""
        self.generation += 1
        return self.generation

    def start(self, device: str, size: int, memory: int | None, generation: int) -> list[Process]:
        """A process for each rank."""
        groups = [Group("127.0.0.1", self.store.port, str(generation), rank, size) for rank in range(size)]
        return [Process(device, memory, group) for group in groups]

    def raise_if_died(self, ranks: Ranks, processes: list[Process]) -> None:
        """Their own connections tell."""

    def traces(self, ranks: Ranks, processes: list[Process], which: list[int]) -> dict[int, str]:
        """Where those ranks stand."""
        return {rank: processes[rank].trace() for rank in which}


class TorchrunMeeting:
    """Ranks that torchrun's processes keep, on as many machines as there are (`agent.py`)."""

    def __init__(self, host: str, port: int) -> None:
        from gaugeblock.conformance.engine.processes.agent import connect

        self.host, self.port = host, port
        self.store = connect(host, port)
        self.door = Door(socket.gethostname() if host not in ("127.0.0.1", "localhost") else "127.0.0.1")
        self.generation = 0

    def next_generation(self) -> int:
        """A number for the next processes."""
        self.generation += 1
        return self.generation

    def start(self, device: str, size: int, memory: int | None, generation: int) -> list[Process]:
        """Asks the agents for a process for each rank, and lets them in."""
        for rank in range(size):
            name = self.door.name_of(generation, rank)
            self.store.set(f"{generation}/door/{rank}", f"{self.door.host} {self.door.port} {name}")
        self.store.set(f"{generation}/size", str(size))
        self.store.set("generation", str(generation))
        deadline = time.monotonic() + START_SECONDS
        links = [self.door.open(self.door.name_of(generation, rank), deadline) for rank in range(size)]
        groups = [Group(self.host, self.port, str(generation), rank, size) for rank in range(size)]
        return [Process(device, memory, group, link) for group, link in zip(groups, links, strict=True)]

    def raise_if_died(self, ranks: Ranks, processes: list[Process]) -> None:
        """What the agents have seen."""
        for rank in range(len(processes)):
            key = f"{ranks.generation}/died/{rank}"
            if self.store.check([key]):
                code, _, errors = self.store.get(key).decode().partition("\n")
                how = signal.Signals(-int(code)).name if int(code) < 0 else f"exit status {code}"
                details = (errors.strip(),) if errors.strip() else ()
                raise ranks._lost(f"rank {rank}: the process died ({how})", "crash", place_in(errors), details)

    def traces(self, ranks: Ranks, processes: list[Process], which: list[int]) -> dict[int, str]:
        """Where those ranks stand."""
        self.store.set(f"{ranks.generation}/trace", b"")
        keys = {rank: f"{ranks.generation}/traced/{rank}" for rank in which}
        deadline = time.monotonic() + 10
        while not self.store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return {rank: self.store.get(key).decode() if self.store.check([key]) else "" for rank, key in keys.items()}


_meetings: list[LocalMeeting | TorchrunMeeting] = []


def _meeting() -> LocalMeeting | TorchrunMeeting:
    """Where the ranks of this process meet."""
    if not _meetings:
        if RANKS in os.environ:
            host, port, _ = os.environ[RANKS].rsplit(":", 2)
            _meetings.append(TorchrunMeeting(host, int(port)))
        else:
            _meetings.append(LocalMeeting())
    return _meetings[0]


def _shard(contract: Contract, sharding: Sharding, parameters: Parameters, call: Call, rank: int, size: int) -> Call:
    specs = contract.specs(parameters)

    def shards(tensors: Tensors) -> Tensors:
        shapes = {key: specs[key].spread if key in specs else () for key in tensors}
        return {
            key: part(each, shapes[key], sharding, rank, size) if isinstance(each, torch.Tensor) else each
            for key, each in tensors.items()
        }

    cotangents = None if call.cotangents is None else shards(call.cotangents)
    return replace(call, inputs=shards(call.inputs), cotangents=cotangents)


def _whole(contract: Contract, sharding: Sharding, parameters: Parameters, parts: list[Tensors]) -> Tensors:
    """The results of all ranks put together."""
    specs = contract.specs(parameters)
    for rank, each in enumerate(parts):
        if each.keys() != parts[0].keys():
            raise Violation(f"rank {rank} returns {', '.join(each)}, rank 0 {', '.join(parts[0])}")
    results = {}
    for key in parts[0]:
        name = key.removeprefix(GRADIENT)
        shape = specs[name].spread if name in specs else ()
        results[key] = join(key, [each[key] for each in parts], shape, sharding)
    return results


def join(key: str, parts: list[torch.Tensor], shape: tuple[object, ...], sharding: Sharding) -> torch.Tensor:
    """One result of all ranks: shards in their order, or what all have alike.

    Raises:
        Violation: If shards do not fit together, or ranks have not alike what they must.
    """
    if split_along(sharding, shape) is not None:
        try:
            return whole(parts, shape, sharding)
        except ValueError as error:
            raise Violation(f"{key}: {error}") from None
    for rank, each in enumerate(parts[1:], 1):
        if not alike(each, parts[0]):
            raise Violation(f"{key} of rank {rank} differs from that of rank 0, though every rank must have it alike")
    return parts[0]


def _all_findings(answers: list[Answer]) -> Findings:
    first = answers[0].findings
    return Findings(
        first.launches,
        [each for answer in answers for each in answer.findings.races],
        [each for answer in answers for each in answer.findings.unbatched],
        sorted({each for answer in answers for each in answer.findings.settings_changed}),
        max(answer.findings.collectives for answer in answers),
        sum(answer.findings.sent_bytes for answer in answers),
    )


def _what(error: Exception) -> str:
    """`raised ...`, whichever way a rank failed."""
    return str(error) if isinstance(error, Raised) else f"raised BadResult: {error}"
