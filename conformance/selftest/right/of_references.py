"""Right variants that follow from a reference alone: in float64, one example after the other, or with all names reversed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Contract, Input
from gaugeblock.conformance.engine.inputs.cases import Case
from gaugeblock.conformance.engine.registry import contracts
from gaugeblock.conformance.selftest.variant import every_case, right
from gaugeblock.reference.torch.precision import at_least_float32

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

LAYERS = (
    "moe_layers.qwen3_moe",
    "moe_layers.qwen2_moe",
    "grouped_moe_layers.deepseek_v2_moe",
    "grouped_moe_layers.deepseek_v3_moe",
    "input_scaled_moe_layers.llama4_moe",
    "biased_moe_layers.gpt_oss_moe",
)
LAYERS_OF_BATCHES = (
    "biased_moe_layers.upcycled_gpt2_moe",
    "dit_moe_layers.dit_moe",
)  # which return something of all tokens

Inputs = Mapping[str, Any]  # tensors, or dicts of them
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
        wide = {name: _of_each(_widened, each) for name, each in inputs.items()}
        return _rounded(contract, inputs, reference(wide))


class OneByOne(OfReference):
    """Each example alone, in float32 at least, so that gradients of what examples share are added up before they are rounded."""

    def compute(self, contract, inputs, reference):
        wide = {name: _of_each(_accurate, each) for name, each in inputs.items()}
        alone = [
            reference(
                {spec.name: wide[spec.name][at] if contract.batch in spec.shape else wide[spec.name] for spec in contract.inputs}
            )
            for at in _places(contract, inputs)
        ]
        return _rounded(contract, inputs, tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))


class NamesReversed(OfReference):
    """What is chosen is numbered from the other end; of equal ones the last so comes first."""

    def compute(self, contract, inputs, reference):
        dimension = next(spec.indexes for spec in contract.outputs if spec.indexes)
        count = 0

        def reversed_of(tensor: torch.Tensor, spec: Input) -> torch.Tensor:
            nonlocal count
            at = [place for place, name in enumerate(spec.shape) if name == dimension]
            count = max([count, *(tensor.shape[place] for place in at)])
            return tensor.flip(at)

        flipped = {}
        for spec in contract.inputs:
            leaves = spec.leaves({}) if spec.leaves else {}
            given = inputs[spec.name]
            flipped[spec.name] = (
                {name: reversed_of(each, leaves[name]) for name, each in given.items()} if leaves else reversed_of(given, spec)
            )
        results = zip(contract.outputs, reference(flipped), strict=True)
        return tuple(count - 1 - each if spec.indexes else reversed_of(each, spec) for spec, each in results)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _rounded(contract: Contract, inputs: Inputs, results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Outputs in the dtypes that they are due in."""
    tested = next((inputs[spec.name].dtype for spec in contract.inputs if spec.dtype == "tested"), None)  # ids have none
    dtypes = (tested if spec.dtype == "tested" else getattr(torch, spec.dtype) for spec in contract.outputs)
    return tuple(each.to(dtype) for each, dtype in zip(results, dtypes, strict=True))


def _accurate(tensor: torch.Tensor) -> torch.Tensor:
    return at_least_float32(tensor) if tensor.is_floating_point() else tensor


def _of_each(change: Callable[[torch.Tensor], torch.Tensor], tensors: Any) -> Any:
    """A change of a tensor, or of each in a dict."""
    return {name: change(each) for name, each in tensors.items()} if isinstance(tensors, Mapping) else change(tensors)


def _places(contract: Contract, inputs: Inputs) -> Iterator[slice]:
    count = next(len(inputs[spec.name]) for spec in contract.inputs if contract.batch in spec.shape)
    return (slice(at, at + 1) for at in range(count))


def _register(variant: type, of: str) -> None:
    made = type(variant.__name__, (variant,), {"of": of, "__doc__": variant.__doc__})
    right(of, validates=False, fits=has_names_alike if variant is NamesReversed else every_case)(made)


def has_names_alike(case: Case) -> bool:
    """Not where the last names are those of experts that do nothing."""
    return not case.parameters.get("num_zero_experts")


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
for _of in LAYERS:
    for _variant in (InFloat64, OneByOne, NamesReversed):
        _register(_variant, _of)
for _of in LAYERS_OF_BATCHES:
    for _variant in (InFloat64, NamesReversed):
        _register(_variant, _of)
for _variant in (InFloat64, OneByOne):
    _register(_variant, "upcycling.adamw_of_used_experts")
