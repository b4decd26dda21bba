"""Right variants that follow from a reference alone: in float64, one example after the other, or with all names reversed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.registry import contracts
from gaugeblock.conformance.selftest.variant import right

# where no kernel is simulated, or what is written by hand is too little
ROUTERS = (
    "routers.topk_softmax",
    "routers.sigmoid_topk",
    "routers.sigmoid_input_scaling",
    "routers.grouped_softmax_topk",
    "routers.biased_softmax_topk",
    "routers.zero_expert_topk",
    "routers.sparsemixer",
)

Inputs = Mapping[str, torch.Tensor]
Results = tuple[torch.Tensor, ...]


class OfReference(ABC):
    """A variant of the reference of a contract: one that returns tensors."""

    of: str

    def __call__(self, *arguments: torch.Tensor, **options: Any) -> torch.Tensor | Results:
        contract = contracts()[self.of]
        inputs = dict(zip((spec.name for spec in contract.inputs), arguments, strict=True))
        alone = len(contract.outputs) == 1

        def reference(tensors: Inputs) -> Results:
            results = contract.reference(*tensors.values(), **options)
            return (results,) if alone else results

        computed = self.compute(contract, inputs, reference)
        return computed[0] if alone else computed

    @abstractmethod
    def compute(self, contract: Contract, inputs: Inputs, reference: Callable[[Inputs], Results]) -> Results:
        """Returns the outputs."""


class InFloat64(OfReference):
    """Everything in float64, rounded once."""

    def compute(self, contract, inputs, reference):
        wide = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
        tested = next(inputs[spec.name].dtype for spec in contract.inputs if spec.dtype == "tested")
        dtypes = (tested if spec.dtype == "tested" else getattr(torch, spec.dtype) for spec in contract.outputs)
        return tuple(each.to(dtype) for each, dtype in zip(reference(wide), dtypes, strict=True))


class OneByOne(OfReference):
    """Each example alone."""

    def compute(self, contract, inputs, reference):
        alone = [
            reference(
                {
                    spec.name: inputs[spec.name][at] if contract.batch in spec.shape else inputs[spec.name]
                    for spec in contract.inputs
                }
            )
            for at in _places(contract, inputs)
        ]
        return tuple(torch.cat(parts) for parts in zip(*alone, strict=True))


class NamesReversed(OfReference):
    """What is chosen is numbered from the other end; of equal ones the last so comes first."""

    def compute(self, contract, inputs, reference):
        dimension = next(spec.indexes for spec in contract.outputs if spec.indexes)
        flips = {spec.name: [at for at, name in enumerate(spec.shape) if name == dimension] for spec in contract.inputs}
        results = reference({name: each.flip(flips[name]) for name, each in inputs.items()})
        last = max(each.shape[at] for name, each in inputs.items() for at in flips[name]) - 1
        return tuple(last - each if spec.indexes else each for spec, each in zip(contract.outputs, results, strict=True))


def _places(contract: Contract, inputs: Inputs) -> Iterator[slice]:
    count = next(len(inputs[spec.name]) for spec in contract.inputs if contract.batch in spec.shape)
    return (slice(at, at + 1) for at in range(count))


def _register(variant: type, of: str) -> None:
    right(of, validates=False)(type(variant.__name__, (variant,), {"of": of, "__doc__": variant.__doc__}))


EXPERTS = (
    "experts.fused_geglu",
    "experts.fused_gelu_mlp",
    "experts.fused_swiglu_oai",
    "experts.shared_swiglu",
    "experts.gated_shared_swiglu",
)

_variant: type[OfReference]
for _of in EXPERTS:
    for _variant in (InFloat64, OneByOne):
        _register(_variant, _of)
for _of in ROUTERS:
    for _variant in (InFloat64, OneByOne, NamesReversed):
        _register(_variant, _of)
for _variant in (InFloat64, NamesReversed):
    _register(_variant, "capacity_routers.expert_choice")
_register(OneByOne, "routers.hash_router")
