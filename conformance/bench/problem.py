"""One workload made ready: scaled to the machine, with inputs, cotangents and the reference's results."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch

from gaugeblock.conformance.bench.roofline import Machine
from gaugeblock.conformance.cases import Draw, input_dtype
from gaugeblock.conformance.contract import Contract, Cost, Parameters, Tensors, Workload
from gaugeblock.conformance.frameworks import Call, call_torch

Direction = Literal["forward", "backward"]
Results = dict[str, Any]  # by the names of outputs and gradients: torch tensors, or jax arrays
SEED = 0


class Unavailable(Exception):
    """Why a competitor does not take part; one line."""


@dataclass(frozen=True)
class Limits:
    """What a problem on the CPU may cost at most, forward."""

    flops: float
    bytes: float


FULL = Limits(flops=2.6e10, bytes=5e8)  # 0.13 s of two cores
QUICK = Limits(flops=1e9, bytes=5e7)


@dataclass(frozen=True)
class Problem:
    """A call to be timed.

    Attributes:
        contract: Of the operation.
        parameters: Sizes and options.
        machine: Where, and in which dtype.
        call: Inputs, options, and the cotangents if the gradients of all inputs are timed too.
        cost: Of the call; forward and backward together cost three times the forward pass.
    """

    contract: Contract
    parameters: Parameters
    machine: Machine
    call: Call
    cost: Cost

    def expected(self) -> Tensors:
        """The PyTorch reference's results."""
        return call_torch(self.contract, self.contract.reference, self.call)

    def deviation(self, results: Results, expected: Tensors) -> float:
        """How far results are from the expected ones: the largest norm of a difference over the norm.

        For integers it is the share that differs. Choices may come in any order.
        """
        found = {key: _to_torch(results[key]).to(right.device) for key, right in expected.items()}
        found, expected = self._in_order(found), self._in_order(expected)
        return max(_deviation(found[key], right) for key, right in expected.items())

    def _in_order(self, results: Tensors) -> Tensors:
        chosen = next((results[spec.name] for spec in self.contract.outputs if spec.indexes), None)
        if chosen is None:
            return results
        order = chosen.argsort(-1)
        names = {spec.name for spec in self.contract.outputs}
        return {key: each.gather(-1, order) if key in names else each for key, each in results.items()}


def make_problem(
    contract: Contract, parameters: Parameters, direction: Direction, machine: Machine
) -> Problem:
    """Draws inputs of the contract's main regime, and cotangents if the direction is backward."""

    def rounded(tensors: Tensors) -> Tensors:
        dtypes = {key: input_dtype(contract, key, machine.dtype) for key in tensors}
        return {key: each.to(machine.device, dtypes[key]) for key, each in tensors.items()}

    inputs = rounded(contract.regimes[0].make(Draw(SEED), parameters))
    cotangents, passes = None, 1
    if direction == "backward":
        draw, passes = Draw(SEED + 1), 3
        flowing = [spec for spec in contract.outputs if spec.differentiable]
        cotangents = rounded(
            {each.name: draw.normal(*(parameters[name] for name in each.shape)) for each in flowing}
        )
    options = {name: parameters[name] for name in contract.options}
    forward = contract.cost(parameters, getattr(torch, machine.dtype).itemsize)
    cost = Cost(passes * forward.flops, passes * forward.bytes)
    return Problem(contract, parameters, machine, Call(inputs, options, cotangents), cost)


def scaled(contract: Contract, workload: Workload, limits: Limits, dtype: str) -> tuple[Parameters, str]:
    """Halves a workload's widths until its bytes are within the limits, then its batch until its flops are.

    Returns:
        The parameters, and the factors by name: `"num_tokens 1/8, widths 1/4"`, or `"full size"`.
    """
    itemsize = getattr(torch, dtype).itemsize
    full = workload.parameters
    parameters = dict(full)
    widths = [name for name in parameters if name.endswith(("_size", "_sizes"))]
    while widths and contract.cost(parameters, itemsize).bytes > limits.bytes:
        parameters |= {name: parameters[name] // 2 for name in widths}
    while contract.cost(parameters, itemsize).flops > limits.flops and parameters[contract.batch] > 1:
        parameters[contract.batch] //= 2
    labels = {contract.batch: contract.batch} | ({"widths": widths[0]} if widths else {})
    smaller = {label: Fraction(parameters[name], full[name]) for label, name in labels.items()}
    return parameters, ", ".join(f"{label} {by}" for label, by in smaller.items() if by != 1) or "full size"


def _to_torch(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else torch.from_dlpack(result)


def _deviation(left: torch.Tensor, right: torch.Tensor) -> float:
    if left.shape != right.shape:
        return float("inf")
    if not right.is_floating_point():
        return (left != right).float().mean().item()
    difference = (left.double() - right.double()).norm() / right.double().norm()
    return difference.nan_to_num(nan=float("inf")).item()
