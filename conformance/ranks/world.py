"""Where an implementation is called: in this process, in JAX on several devices, or once per rank with the rank's shard.

A property runs in every rank alike (the same case, the same order of calls), and what it sees is whole: `call` gives each rank
its shard of the inputs, `whole` puts the ranks' outputs together, and `agree` judges once for all.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gaugeblock.conformance.contract import Contract, Parameters, Tensors
from gaugeblock.conformance.frameworks import CALLERS, Call
from gaugeblock.conformance.judge import Violation
from gaugeblock.conformance.oracle import GRADIENT
from gaugeblock.conformance.registry import Implementation

Result = TypeVar("Result")


class World:
    """One process and one device."""

    size = 1

    def call(self, contract: Contract, parameters: Parameters, implementation: Implementation, call: Call) -> Tensors:
        """What the implementation returns here."""
        return CALLERS[implementation.framework](contract, implementation.load(), call)

    def whole(self, contract: Contract, parameters: Parameters, results: Tensors) -> Tensors:
        """Copies of the results, those of all ranks put together."""
        return {key: tensor.clone() for key, tensor in results.items()}

    def agree(self, judge: Callable[[], Result]) -> Result:
        """What `judge` returns, or raises, in every rank alike."""
        return judge()


class JaxDevices(World):
    """One process that hands global arrays and a mesh of several devices to a JAX function."""

    def __init__(self, size: int) -> None:
        self.size = size

    def call(self, contract: Contract, parameters: Parameters, implementation: Implementation, call: Call) -> Tensors:
        """What the implementation returns, called with `mesh`, whose one axis is "ranks"."""
        import jax

        mesh = jax.sharding.Mesh(jax.devices()[: self.size], ("ranks",))
        return super().call(contract, parameters, implementation, replace(call, options=call.options | {"mesh": mesh}))


class Rank(World):
    """One of several processes, each of which calls the implementation with its shard.

    Args:
        mesh: What the implementation gets: the ranks, along one dimension "ranks".
        group: Of the same ranks on the CPU, for what is exchanged here; nothing of the implementation's meets it.
        report: Tells the leader of "progress", and at once of an error "raised" (the others may wait for this rank for ever),
            which an empty text takes back.
    """

    def __init__(self, mesh: Any, group: Any, report: Callable[[str, str], None]) -> None:
        self.mesh, self.group, self.report = mesh, group, report
        self.size, self.rank = group.size(), group.rank()
        self.calls = 0

    def call(self, contract: Contract, parameters: Parameters, implementation: Implementation, call: Call) -> Tensors:
        """What the implementation returns for this rank's shard; an error of one rank is raised in all."""
        shard = self._shard(contract, parameters, call)
        self._go_on()
        raised: Exception | None = None
        results: Tensors = {}
        try:
            results = super().call(contract, parameters, implementation, shard)
        except Exception as error:
            self.report("raised", traceback.format_exc())
            raised = error
        told = [each for each in self._exchange(raised if raised is None else _portable(raised)) if each is not None]
        if raised is not None:
            self.report("raised", "")
            raise raised
        if told:
            raise told[0]
        return results

    def whole(self, contract: Contract, parameters: Parameters, results: Tensors) -> Tensors:
        """Shards one behind the other; of what every rank must have alike, the value; of its gradients, the sum over ranks.

        Raises:
            Violation: If ranks differ in what they must have alike, or shards do not fit together.
        """
        parts = self._exchange({key: tensor.detach().cpu() for key, tensor in results.items()})
        device = next((tensor.device for tensor in results.values()), torch.device("cpu"))
        joined = {}
        for key in parts[0]:
            if any(key not in part for part in parts):
                raise Violation(f"{key} is returned by some ranks only")
            spec = contract.specs(parameters).get(key.removeprefix(GRADIENT))
            along = [place for place, name in enumerate(spec.shape if spec else ()) if name in contract.sharded]
            joined[key] = _join(key, [part[key] for part in parts], along).to(device)
        return joined

    def agree(self, judge: Callable[[], Result]) -> Result:
        """What `judge` returns, or the violation it raises, in rank 0."""
        outcome: Any = None
        self._go_on()
        if self.rank == 0:
            try:
                outcome = judge()
            except Violation as violation:
                outcome = violation
        outcome = self._exchange(outcome)[0]
        if isinstance(outcome, Violation):
            raise outcome
        return outcome

    def settle(self, violation: Violation | None) -> Violation | None:
        """The end of a property: the first violation that any rank has seen, if there is one."""
        try:
            found = self._exchange(None) if violation is None else self._send_violation(violation)
        except Violation as seen:
            return seen
        return violation if found else None

    def _go_on(self) -> None:
        self.calls += 1
        self.report("progress", str(self.calls))

    def _exchange(self, value: Any) -> list[Any]:
        """The value of every rank; a rank that has left with a violation raises it in all."""
        return self._gather(("value", value))

    def _send_violation(self, violation: Violation) -> list[Any]:
        return self._gather(("violation", violation))

    def _gather(self, message: tuple[str, Any]) -> list[Any]:
        messages: list[Any] = [None] * self.size
        dist.all_gather_object(messages, message, group=self.group)
        for kind, value in messages:
            if kind == "violation":
                raise value
        return [value for _, value in messages]

    def _shard(self, contract: Contract, parameters: Parameters, call: Call) -> Call:
        specs = contract.specs(parameters)

        def shards(tensors: Tensors) -> Tensors:
            shapes = {key: specs[key].shape if key in specs else () for key in tensors}
            return {key: self._part(tensor, shapes[key], contract.sharded) for key, tensor in tensors.items()}

        cotangents = None if call.cotangents is None else shards(call.cotangents)
        return replace(call, inputs=shards(call.inputs), cotangents=cotangents, options=call.options | {"mesh": self.mesh})

    def _part(self, tensor: Any, shape: tuple[str | int, ...], sharded: Mapping[str, Any]) -> Any:
        for place, name in enumerate(shape):
            if name in sharded and isinstance(tensor, torch.Tensor) and place < tensor.ndim:
                tensor = tensor.tensor_split(self.size, dim=place)[self.rank]
        return tensor


def fit(contract: Contract, parameters: Parameters, size: int) -> dict[str, Any]:
    """Parameters with those sizes rounded up that must divide evenly among the ranks."""
    even = {name for name, share in contract.sharded.items() if share == "even"}
    return {name: -(-value // size) * size if name in even else value for name, value in parameters.items()}


def _join(key: str, parts: list[torch.Tensor], along: list[int]) -> torch.Tensor:
    if along:
        try:
            return torch.cat(parts, dim=along[0])
        except RuntimeError:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise Violation(f"{key}: the ranks' shards do not fit together: {shapes}") from None
    if key.startswith(GRADIENT):
        return torch.stack(parts).sum(0)
    for rank, part in enumerate(parts[1:], 1):
        if part.shape != parts[0].shape or not torch.equal(part.nan_to_num(), parts[0].nan_to_num()):
            raise Violation(f"{key} of rank {rank} differs from that of rank 0, though every rank must have it alike")
    return parts[0]


def _portable(error: Exception) -> Exception:
    """An error that can be sent: of the same builtin kind, without what cannot be pickled."""
    kinds = (ValueError, TypeError, FloatingPointError, NotImplementedError)
    return next((each for each in kinds if isinstance(error, each)), RuntimeError)(str(error))
