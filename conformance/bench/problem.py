"""One workload made ready: scaled to the machine, with inputs, cotangents and the reference's results."""

import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch

from gaugeblock.conformance.bench.roofline import Machine
from gaugeblock.conformance.engine.budget.oracle import GRADIENT
from gaugeblock.conformance.engine.calls import argument_of
from gaugeblock.conformance.engine.contract import Contract, Cost, Workload
from gaugeblock.conformance.engine.frameworks import Call, call_torch
from gaugeblock.conformance.engine.inputs.cases import Case, dtypes_of, options
from gaugeblock.conformance.engine.inputs.cases import cotangents as drawn_cotangents
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors

Direction = Literal["forward", "backward"]
Results = dict[str, Any]  # by the names of outputs and gradients: torch tensors, or jax arrays
SEED = 0
TIES = 0.05  # the most examples whose choices may be others: in bfloat16's digits, scores of many experts tie often


class Unavailable(Exception):
    """Why a competitor does not take part; one line."""


@dataclass(frozen=True)
class Limits:
    """What a problem on the CPU may cost at most, forward."""

    flops: float
    bytes: float


FULL = Limits(flops=2.6e10, bytes=5e8)  # 0.13 s of two cores
QUICK = Limits(flops=1e9, bytes=5e7)
RIGID = 4  # times as much may cost what has widths that cannot be made smaller


@dataclass(frozen=True)
class Problem:
    """A call to be timed."""

    contract: Contract
    """Of the operation."""
    parameters: Parameters
    """Sizes and options."""
    machine: Machine
    """Where, and in which dtype."""
    call: Call
    """Inputs, options, and the cotangents if the gradients of all inputs are timed too."""
    cost: Cost
    """Of the call; forward and backward together cost three times the forward pass."""

    def expected(self) -> Tensors:
        """The PyTorch reference's results."""
        return call_torch(self.contract, self.contract.reference, self.call)

    def deviation(self, results: Results, expected: Tensors) -> float:
        """How far results are from the expected ones: the largest norm of a difference over the norm, argument by argument.

        For integers it is the share that differs. Choices may come in any order; of a few examples they may be others, where
        scores tie, and what is computed is compared in the examples whose choices agree. Cotangents belong to places, so that
        gradients are compared where the order agrees too.
        """
        found = {key: _to_torch(results[key]).to(right.device) for key, right in expected.items()}
        for key, right in expected.items():
            if found[key].shape != right.shape:
                return float("inf")
        in_order = _rows_that_agree(found, expected)
        found, expected = self._in_order(found), self._in_order(expected)
        agree = _rows_that_agree(found, expected)
        if not _all_but_ties(in_order):  # another order, which is no tie, shows in the gradients
            in_order = agree
        pairs: dict[tuple[str, bool], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for key, right in expected.items():
            alike = in_order if key.startswith(GRADIENT) else agree
            rows = alike if right.is_floating_point() and right.shape[:1] == alike.shape else ...
            pairs[argument_of(key), right.is_floating_point()].append((found[key][rows], right[rows]))
        chooses = any(spec.indexes for spec in self.contract.outputs)
        if chooses and _all_but_ties(agree):
            pairs = {key: each for key, each in pairs.items() if key[1]}
        return max(map(_deviation, pairs.values()))

    def _in_order(self, results: Tensors) -> Tensors:
        """Choices sorted, and with them the outputs that have one value for each choice."""
        chosen = next((spec for spec in self.contract.outputs if spec.indexes), None)
        if chosen is None:
            return results
        order = results[chosen.name].argsort(-1)
        beside = {spec.name for spec in self.contract.outputs if spec.shape == chosen.shape}
        return {key: each.gather(-1, order) if key in beside else each for key, each in results.items()}


def directions(contract: Contract) -> tuple[Direction, ...]:
    """Backward too, where gradients flow from an output to an input."""
    flows = all(any(spec.differentiable for spec in side) for side in (contract.inputs, contract.outputs))
    return ("forward", "backward") if flows else ("forward",)


def make_problem(contract: Contract, parameters: Parameters, direction: Direction, machine: Machine) -> Problem:
    """Draws inputs of the contract's main regime, and cotangents if the direction is backward."""
    regime = contract.regimes[0]
    case = Case(**parameters, regime=regime.name, seed=SEED)
    dtypes = dtypes_of(contract, parameters, machine.dtype)

    def rounded(tensors: Tensors) -> Tensors:
        return {key: each.to(machine.device, dtypes[key]).contiguous() for key, each in tensors.items()}

    inputs = rounded(regime.make(Draw(SEED), parameters))  # not by make_inputs, which keeps what it drew in float64
    backward = direction == "backward"
    cotangents = rounded(drawn_cotangents(contract, case)) if backward else None
    forward, passes = contract.cost(parameters, getattr(torch, machine.dtype).itemsize), 3 if backward else 1
    cost = Cost(passes * forward.flops, passes * forward.bytes)
    return Problem(contract, parameters, machine, Call(inputs, options(contract, case), cotangents), cost)


def fits(contract: Contract, workload: Workload, limits: Limits, dtype: str) -> bool:
    """Whether a workload in full size is within the limits."""
    cost = contract.cost(workload.parameters, getattr(torch, dtype).itemsize)
    return cost.flops <= limits.flops and cost.bytes <= limits.bytes


def scaled(contract: Contract, workload: Workload, limits: Limits, dtype: str) -> tuple[Parameters, str]:
    """Halves a workload's widths until its bytes are within the limits, then its batch until its flops are.

    The widths of a rigid contract stay; it may cost `RIGID` times as much.

    Returns:
        The parameters, and the factors by name: `"num_tokens 1/8, widths 1/4"`, or `"full size"`.

    Raises:
        Unavailable: No halving brings the bytes within the limits, or of a rigid contract the flops.
    """
    itemsize = getattr(torch, dtype).itemsize
    full = workload.parameters
    parameters = dict(full)
    widths = [name for name in parameters if name.endswith(("_size", "_sizes")) and name != contract.batch]
    if contract.rigid:
        widths, limits = [], Limits(RIGID * limits.flops, RIGID * limits.bytes)
    while min((parameters[name] for name in widths), default=1) > 1 and contract.cost(parameters, itemsize).bytes > limits.bytes:
        parameters |= {name: parameters[name] // 2 for name in widths}
    while contract.cost(parameters, itemsize).flops > limits.flops and parameters[contract.batch] > 1:
        parameters[contract.batch] //= 2
    least = contract.cost(parameters, itemsize)
    if least.bytes > limits.bytes or (contract.rigid and least.flops > limits.flops):
        needed = f"{least.flops:.0e} operations and {least.bytes:.0e} bytes"
        raise Unavailable(f"needs {needed} at least; a problem on a CPU has {limits.flops:.0e} and {limits.bytes:.0e}")
    labels = {contract.batch: contract.batch} | ({"widths": widths[0]} if widths else {})
    smaller = {label: Fraction(parameters[name], full[name]) for label, name in labels.items()}
    return parameters, ", ".join(f"{label} {by}" for label, by in smaller.items() if by != 1) or "full size"


def _rows_that_agree(found: Tensors, expected: Tensors) -> torch.Tensor:
    """Of the examples, those of which all whole numbers are the expected ones; empty where there are no whole numbers."""
    whole = [(found[key], right) for key, right in expected.items() if not right.is_floating_point() and right.ndim]
    length = {len(right) for _, right in whole}
    if len(length) != 1:
        return torch.empty(0, dtype=torch.bool)
    same = [(left == right).flatten(1).all(1) if right.ndim > 1 else left == right for left, right in whole]
    return torch.stack(same).all(0)


def _all_but_ties(agree: torch.Tensor) -> bool:
    return bool(agree.float().mean() >= 1 - TIES)


def _to_torch(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else torch.from_dlpack(result)


def _deviation(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    if not pairs[0][1].is_floating_point():
        return max((left != right).float().mean().item() for left, right in pairs)
    difference = sum((left.double() - right.double()).square().sum().item() for left, right in pairs)
    norm = sum(right.double().square().sum().item() for _, right in pairs)
    return 0.0 if difference == 0 else math.sqrt(difference / norm) if norm > 0 and math.isfinite(difference) else float("inf")
