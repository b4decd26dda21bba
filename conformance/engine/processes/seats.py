"""Which process calls which implementation: this one, one of its own, or one for each rank."""

import atexit
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gaugeblock.conformance.engine.calls import argument_of
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.frameworks import Call
from gaugeblock.conformance.engine.implementation import Candidate, Implementation
from gaugeblock.conformance.engine.processes.handle import WITH_THE_NURSERY, Answer, Lost, Process
from gaugeblock.conformance.engine.processes.perform import Conditions, perform
from gaugeblock.conformance.engine.processes.process import KEPT
from gaugeblock.conformance.engine.processes.ranks import Ranks
from gaugeblock.conformance.engine.processes.wire import Arena
from gaugeblock.conformance.engine.vocabulary import Tensors

if TYPE_CHECKING:
    from gaugeblock.conformance.engine.trial import Subject

SLACK_BYTES = 1 << 20  # that results may take beyond what is due, before only their shapes are passed on
MOST_SEATS = 4  # processes of candidates that wait for their next call: each takes 250 MB
GIB = 1 << 30


class Seat:
    """Where one subject is called, on so many devices; its processes start when first needed, and again when they are lost.

    An implementation that can be loaded by its name is called in a process that knows nothing but it; a function that exists
    in this process alone, as tests have them, is called here.
    """

    def __init__(self, subject: "Subject", world_size: int) -> None:
        self.subject, self.world_size = subject, world_size

    def call(self, parameters: Mapping[str, Any], call: Call, conditions: Conditions, **how: bool) -> Answer:
        """One call; results are copies.

        Raises:
            Raised, BadResult: What the candidate raised, or returned.
            Lost: If its process is gone.
        """
        implementation, most_bytes = self.subject.implementation, _most_bytes(self.subject.contract, parameters, call)
        if self.subject.on_ranks:
            ranks = self._ranks()
            contract, sharding = self.subject.contract, self.subject.sharding
            return ranks.call(contract, sharding, parameters, implementation, call, conditions, most_bytes, **how)
        if self._is_here():
            if self.subject.device != "cpu":
                call = _moved(call, self.subject.device)
            results, findings = perform(implementation, call, conditions)
            _kept.append(results)
            return Answer({key: tensor.cpu().clone() for key, tensor in results.items()}, findings)
        try:
            return self._process().call(implementation, call, conditions, most_bytes, **how)
        except Lost as lost:  # another candidate may have ended what they all come from
            if lost.message != WITH_THE_NURSERY:
                raise
        return self._process().call(implementation, call, conditions, most_bytes, **how)

    def last(self) -> Any:
        """The last call, for `again`."""
        if self.subject.on_ranks:
            return self._ranks().number
        return _kept[-1] if self._is_here() else self._process().number

    def again(self, parameters: Mapping[str, Any], call: Any) -> Tensors:
        """What now stands in the memory of the results of an earlier call, of the last few."""
        contract = self.subject.contract
        if self.subject.on_ranks:
            return self._ranks().again(contract, self.subject.sharding, parameters, self.world_size, call, GIB)
        if self._is_here():
            return {key: tensor.cpu().clone() for key, tensor in call.items()}
        return self._process().again(call, GIB)

    def printed(self) -> str:
        """What the candidate has printed since this was last asked."""
        found = _seats.get(self._name())
        return found.printed() if found is not None else ""

    def _is_here(self) -> bool:
        function = self.subject.implementation.function
        return not isinstance(function, str | Candidate)

    def _name(self) -> tuple[Any, ...]:
        if self.subject.on_ranks:
            return self.subject.device, "ranks"
        implementation = self.subject.implementation
        source = implementation.function if isinstance(implementation.function, Candidate) else None
        own = (source, implementation.contract, implementation.name) if source else ()
        return self.subject.device, _memory(implementation, self.subject.device), own

    def _process(self) -> Process:
        found = _seats.pop(self._name(), None)
        if found is None or not found.alive:
            found = Process(self.subject.device, _memory(self.subject.implementation, self.subject.device))
        _seats[self._name()] = found  # the last of all
        alone = [name for name, each in _seats.items() if isinstance(each, Process)]
        for name in alone[:-MOST_SEATS]:
            _seats.pop(name).stop()
        return found

    def _ranks(self) -> Ranks:
        from gaugeblock.conformance.engine.devices import torchrun_world_size

        size = torchrun_world_size() or max(self.subject.implementation.world_sizes)
        found = _seats.get(self._name())
        if found is None or not found.alive or found.size < size:
            if found is not None:
                found.stop()
            memory = _memory(self.subject.implementation, self.subject.device)
            found = _seats[self._name()] = Ranks(self.subject.device, size, memory)
        return found


_seats: dict[Any, Any] = {}  # of this process
_kept: deque[Tensors] = deque(maxlen=KEPT)  # results of the last calls that were made here


@atexit.register
def stop_all() -> None:
    """Ends every candidate's process."""
    for each in _seats.values():
        each.stop()
    _seats.clear()


def _memory(implementation: Implementation, device: str) -> int | None:
    """Bytes of address space, but on GPUs, whose drivers reserve all of it."""
    return int(implementation.memory_gib * GIB) if device == "cpu" else None


def _moved(call: Call, device: str) -> Call:
    """The call with its tensors on another device, with the same strides."""
    arena = Arena(shared=False)
    placed, end = arena.place(call.inputs, 0)
    given = None if call.cotangents is None else arena.place(call.cotangents, end)[0]
    cotangents = None if given is None else arena.tensors(given, device)
    return replace(call, inputs=arena.tensors(placed, device), cotangents=cotangents)


def _most_bytes(contract: Contract, parameters: Mapping[str, Any], call: Call) -> int:
    """What right results can take, and some more."""
    outputs = {spec.name for spec in contract.outputs}
    due = 0
    for key, spec in contract.specs(parameters).items():
        if argument_of(key) in outputs:
            count = 8  # bytes of the widest dtype
            for size in spec.sizes(dict(parameters)):
                count *= size
            due += count
    gradients = sum(each.numel() * 8 for each in call.inputs.values()) if call.cotangents is not None else 0
    steps = max((each.shape[0] for each in call.inputs.values() if each.ndim), default=1) if contract.recurrence else 1
    return 4 * (due * max(1, steps) + gradients) + SLACK_BYTES
