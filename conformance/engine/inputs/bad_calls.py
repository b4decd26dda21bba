"""Bad calls that follow from a contract's signature alone: ranks, shared sizes, dtypes, ids, devices, entries of a state dict,
kinds of options.

Those that only the contract knows (a `top_k` above the number of experts) are its `rejections`.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_origin

import torch

from gaugeblock.conformance.engine.contract import Contract, Input, Rejection
from gaugeblock.conformance.engine.vocabulary import Parameters

Spoil = Callable[[dict[str, Any]], Mapping[str, Any]]
UNKNOWN = "gaugeblock.unknown"  # an entry that no state dict has, and no choice among names
OF_ANOTHER_KIND: Mapping[Any, Mapping[str, Any]] = {
    int: {"text": "1", "a fraction": 1.5, "a truth value": True},
    float: {"text": "1", "a truth value": True, "no number": math.nan, "infinity": math.inf},
    Literal: {"another name": UNKNOWN},
}


def bad_calls(contract: Contract, parameters: Parameters) -> list[Rejection]:
    """All bad calls of a contract: those that follow from its signature, then its own."""
    return [
        *_of_tensors(contract, parameters),
        *_of_entries(contract, parameters),
        *_of_options(contract),
        *contract.rejections,
    ]


def changed(key: str, change: Callable[[Any], Any]) -> Spoil:
    """The call with one input or option replaced by a function of itself."""
    return lambda call: {key: change(call[key])}


def of_another_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """Floating numbers of another precision."""
    return tensor.to(torch.float16 if tensor.dtype == torch.float32 else torch.float32)


def _of_tensors(contract: Contract, parameters: Parameters) -> Iterator[Rejection]:
    tensors = [spec for spec in contract.inputs if not spec.leaves]
    for position, spec in enumerate(tensors):
        lead = int(contract.recurrence is not None and spec.shape[:1] == (contract.recurrence.steps,))
        if not spec.any_rank:
            yield Rejection(f"{spec.name} of a rank more", spec.name, changed(spec.name, partial(torch.unsqueeze, dim=lead)))
        if len(spec.shape) > lead and not spec.any_rank:
            yield Rejection(f"{spec.name} of a rank less", spec.name, changed(spec.name, partial(_first, dim=lead)))
        yield Rejection(f"{spec.name} of {_other_kind(spec)}", spec.name, changed(spec.name, _of_other_kind))
        before = tensors[:position]
        for axis, dimension in enumerate(spec.shape[lead:], lead):
            sharing = tuple(other.name for other in before if isinstance(dimension, str) and dimension in other.shape)
            if sharing:
                longer, shorter = (changed(spec.name, partial(change, dim=axis)) for change in (_one_more, _one_less))
                yield Rejection(f"{spec.name} with a {dimension} of one more", (spec.name, *sharing), longer)
                if parameters[str(dimension)] > 1:
                    yield Rejection(f"{spec.name} with a {dimension} of one less", (spec.name, *sharing), shorter)
        if spec.indexes:
            for id_, what in ((-1, "a negative id"), (parameters[spec.indexes], f"an id of {spec.indexes}")):
                ids = partial(torch.full_like, fill_value=id_)
                yield Rejection(f"{spec.name} with {what}", spec.name, changed(spec.name, ids), by_values=True)
        if before or contract.state:
            names = (spec.name, *(other.name for other in contract.inputs if other is not spec))
            yield Rejection(f"{spec.name} on another device", names, lambda call: {}, elsewhere=spec.name)


def _of_entries(contract: Contract, parameters: Parameters) -> Iterator[Rejection]:
    state = contract.state
    if state is None or state.leaves is None:
        return
    leaves = state.leaves(parameters)
    floating = [name for name, leaf in leaves.items() if leaf.dtype == "tested" or leaf.dtype.startswith("float")]
    for name in dict.fromkeys((floating[0], floating[-1])):
        key = f"{state.name}/{name}"
        yield Rejection(f"no {name}", name, partial(_replaced, key, None))
        dimensions = {each for each in leaves[name].shape if isinstance(each, str)}
        others = {**leaves, **{spec.name: spec for spec in contract.inputs}}
        sharing = (other for other, leaf in others.items() if dimensions & set(leaf.shape) and other != name)
        if leaves[name].shape:
            yield Rejection(f"{name} of another size", (name, *sharing), changed(key, partial(_one_more, dim=-1)))
        yield Rejection(f"{name} of a rank more", name, changed(key, partial(torch.unsqueeze, dim=0)))
        yield Rejection(f"{name} of integers", name, changed(key, _of_other_kind))
        if leaves[name].dtype == "tested":
            yield Rejection(f"{name} of another dtype", name, changed(key, of_another_dtype))
        names = (name, *(spec.name for spec in contract.inputs if spec is not state))
        yield Rejection(f"{name} on another device", names, lambda call: {}, elsewhere=key)
    copied = f"{state.name}/{floating[0]}"
    yield Rejection("an entry too many", UNKNOWN, lambda call: {f"{state.name}/{UNKNOWN}": call[copied]})


def _of_options(contract: Contract) -> Iterator[Rejection]:
    signature = inspect.signature(contract.reference, eval_str=True).parameters
    for name in contract.options:
        kind = signature[name].annotation
        for what, value in OF_ANOTHER_KIND.get(get_origin(kind) or kind, {}).items():
            yield Rejection(f"{name} as {what}", name, partial(_replaced, name, value))


def _replaced(key: str, value: Any, call: dict[str, Any]) -> Mapping[str, Any]:
    return {key: value}


def _first(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor.select(dim, 0)


def _one_more(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    shape = [*tensor.shape]
    shape[dim] = 1  # of what is empty there is no first to repeat
    return torch.cat([tensor, tensor.narrow(dim, 0, 1) if tensor.shape[dim] else tensor.new_zeros(shape)], dim)


def _one_less(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor.narrow(dim, 0, tensor.shape[dim] - 1)


def _other_kind(spec: Input) -> str:
    return "integers" if spec.dtype == "tested" or spec.dtype.startswith("float") else "floating numbers"


def _of_other_kind(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int32 if tensor.is_floating_point() else torch.float32)
