"""Several runs of the same code at once: tensors that hold a value for each run and look like one.

`Runs` is what twelve runs under rounding noise make of one tensor. `perform` does an operation for all of them: most in one call,
as one of torch's own with a dimension more in front; what has no such form, run by run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

# Operations that do the same along each of the other dimensions; all their tensors have as many. The dimensions that they name,
# counted from the end, are the same with one more in front.
ALONG = frozenset(
    """sum mean amax amin argmax cumsum topk sort gather scatter scatter_ scatter_add scatter_add_ cat split split_with_sizes
    unbind select slice transpose squeeze any all logsumexp _softmax _log_softmax _softmax_backward_data
    _log_softmax_backward_data flip""".split()
)
RAISED = frozenset({"unsqueeze", "stack"})  # of which the dimension is one of the result's
DIMENSIONS = frozenset({"dim", "dims", "dim0", "dim1"})  # their arguments
ALIKE = frozenset("_to_copy alias detach clone zeros_like ones_like full_like empty_like zero_ tril triu".split())  # of any rank
ALIGNED = frozenset({"copy_", "fill_", "masked_fill_"})  # elementwise, though torch does not mark them so
SHAPED = frozenset({"view", "_unsafe_view", "expand", "repeat"})  # of which the second argument is a shape
INDEXED = frozenset({"index", "index_put", "index_put_"})  # of which it is a list of indices


class RunsDiffer(Exception):
    """The runs cannot be done at once: they take different ways, or write to what they share."""


class Runs(torch.Tensor):
    """A tensor in several runs; its shape and strides are those of one.

    Attributes:
        all_runs: Its values, `[runs, *shape]`.
    """

    all_runs: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "Runs":
        """Looks like `values[0]`."""
        tensor: Runs = torch.Tensor._make_wrapper_subclass(
            cls, values.shape[1:], strides=values.stride()[1:], dtype=values.dtype, device=values.device
        )
        tensor.all_runs = values
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Whoever made several runs does what is done with them."""
        raise RunsDiffer(f"{func} on several runs at once")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Runs({self.all_runs!r})"


@dataclass(frozen=True)
class Each:
    """A number that differs from run to run."""

    numbers: Sequence[float]


def values_of(tensor: torch.Tensor, runs: int) -> torch.Tensor:
    """`[runs, *shape]`, whether or not the runs differ."""
    return tensor.all_runs if isinstance(tensor, Runs) else tensor.expand(runs, *tensor.shape)


def of_run(run: int, value: Any) -> Any:
    """What an argument, or several, are in one run."""
    if isinstance(value, Runs):
        return value.all_runs[run]
    if isinstance(value, Each):
        return value.numbers[run]
    if isinstance(value, tuple | list):
        return type(value)([of_run(run, each) for each in value])
    return {key: of_run(run, each) for key, each in value.items()} if isinstance(value, dict) else value


def perform(func: Any, args: tuple, kwargs: dict, runs: int) -> Any:
    """Does an operation in each run.

    Args:
        func: An overload of `torch.ops`.
        runs: How many there are.

    Returns:
        What it returns: `Runs` of a tensor, unless no run differs.

    Raises:
        RunsDiffer: The runs come to different numbers, shapes or truths, or something that is the same for all of them would be
            written to.
    """
    several = _kinds(args) | _kinds(kwargs.values()) if kwargs else _kinds(args)
    if not several & {Runs, Each}:
        return func(*args, **kwargs)
    written = func._schema.is_mutable
    if written and not isinstance(args[0], Runs):
        raise RunsDiffer(f"{func} writes to what all runs share")
    if Each not in several:
        result = _at_once(func, args, kwargs, runs)
        if result is not None:
            return args[0] if written else _wrapped(result, collapsed=not func.is_view)
    if func.is_view:
        raise RunsDiffer(f"{func} is a view of several runs")
    results = [func(*of_run(run, args), **of_run(run, kwargs)) for run in range(runs)]
    return args[0] if written else _together(func, results)


def _kinds(values: Iterable[Any]) -> set[type]:
    """The types of arguments, also of those in lists."""
    kinds = {type(each) for each in values}
    if kinds & {list, tuple}:
        for each in values:
            if isinstance(each, list | tuple):
                kinds |= _kinds(each)
    return kinds


@lru_cache(None)
def _is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in ALIGNED


@lru_cache(None)
def _dimensions(func: Any) -> tuple[tuple[int, Any], ...]:
    """Where an operation takes dimensions, and what is meant where it gets none."""
    declared = enumerate(func._schema.arguments)
    return tuple((position, each.default_value) for position, each in declared if each.name in DIMENSIONS and not each.kwarg_only)


def _at_once(func: Any, args: tuple, kwargs: dict, runs: int) -> Any:
    """What one call comes to for all runs; None if there is no such call."""
    name = func.overloadpacket.__name__
    if _is_pointwise(func):
        rank = max(each.ndim for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
        return func(*_aligned(args, rank), **_aligned(kwargs, rank))
    if name in ALONG or name in RAISED:
        counted = _counted_from_the_end(func, args, name in RAISED)
        return None if counted is None else func(*_stacked(counted, runs), **_stacked(kwargs, runs))
    if name in ALIKE:
        return func(args[0].all_runs, *args[1:], **kwargs)
    if name in SHAPED and len(args) == 2:
        return func(_aligned(args[0], len(args[1])), [1 if name == "repeat" else runs, *args[1]], **kwargs)
    if name == "permute":
        return func(args[0].all_runs, [0, *(each % args[0].ndim + 1 for each in args[1])])
    if name == "t" and args[0].ndim == 2:
        return args[0].all_runs.transpose(1, 2)
    if name == "mm" and not isinstance(args[1], Runs):
        return torch.matmul(args[0].all_runs, args[1])  # one product of all rows
    if name in ("mm", "bmm"):
        return torch.matmul(*_stacked(args, runs))
    if name == "convolution" and not any(isinstance(each, Runs) for each in args[1:3]):
        out = func(args[0].all_runs.flatten(0, 1), *args[1:], **kwargs)  # one of the images of all runs
        return out.unflatten(0, (runs, -1))
    if name in INDEXED and isinstance(args[0], Runs) and not any(isinstance(each, Runs) for each in args[1]):
        given = [position for position, each in enumerate(args[1]) if each is not None]
        if given[-1] - given[0] == len(given) - 1:  # else what they choose would come before the runs
            rest = args[2:] if name == "index" else (_raised(args[0], args[1], args[2], runs), *args[3:])
            return func(args[0].all_runs, [None, *args[1]], *rest, **kwargs)
    return None


def _aligned(value: Any, rank: int) -> Any:
    """With the dimension of runs in front of `rank` others."""
    if isinstance(value, Runs):
        missing = rank - value.ndim
        return value.all_runs.view(len(value.all_runs), *(1,) * missing, *value.shape) if missing > 0 else value.all_runs
    if isinstance(value, tuple | list):
        return type(value)([_aligned(each, rank) for each in value])
    return {key: _aligned(each, rank) for key, each in value.items()} if isinstance(value, dict) else value


def _stacked(value: Any, runs: int) -> Any:
    """With the dimension of runs in front of every tensor."""
    if isinstance(value, torch.Tensor):
        return values_of(value, runs)
    if isinstance(value, tuple | list):
        return type(value)([_stacked(each, runs) for each in value])
    return {key: _stacked(each, runs) for key, each in value.items()} if isinstance(value, dict) else value


def _counted_from_the_end(func: Any, args: tuple, raised: bool) -> tuple | None:
    """With dimensions as negative numbers; None if they are not named."""
    first = args[0][0] if isinstance(args[0], tuple | list) else args[0]
    rank = max(1, first.ndim + raised)
    counted = list(args)
    dimensions = _dimensions(func)
    for position, default in dimensions:
        if position == len(counted):
            counted.append(default)
        named = counted[position] if position < len(counted) else None
        if named is None or named == []:
            return None
        counted[position] = named % rank - rank if isinstance(named, int) else [each % rank - rank for each in named]
    return tuple(counted) if dimensions else None


def _raised(table: torch.Tensor, indices: Sequence[torch.Tensor | None], put: torch.Tensor, runs: int) -> torch.Tensor:
    """What is put at indices, with as many dimensions between the runs and its own as it would be broadcast along."""
    given = [each for each in indices if each is not None]
    missing = table.ndim - len(given) + max(each.ndim for each in given) - put.ndim
    return values_of(put, runs).reshape(runs, *(1,) * missing, *put.shape)


def _wrapped(result: Any, *, collapsed: bool) -> Any:
    if isinstance(result, torch.Tensor):
        return _wrapped_tensor(result, collapsed)
    return type(result)([_wrapped(each, collapsed=collapsed) for each in result])


def _wrapped_tensor(values: torch.Tensor, collapsed: bool) -> torch.Tensor:
    """`Runs`, or one tensor of ids or truths if all runs came to the same."""
    if collapsed and not values.is_floating_point() and bool((values == values[0]).all()):
        return values[0]
    return Runs(values)


def _together(func: Any, results: list[Any]) -> Any:
    """What the runs came to one by one, as one result."""
    columns, forms = zip(*map(tree_flatten, results), strict=True)
    joined = []
    for column in zip(*columns, strict=True):
        first = column[0]
        if not isinstance(first, torch.Tensor):
            if any(each != first for each in column):
                raise RunsDiffer(f"{func} is not the same in all runs")
            joined.append(first)
        elif any(each.shape != first.shape for each in column):
            raise RunsDiffer(f"{func} has not the same shape in all runs")
        else:
            joined.append(_wrapped_tensor(torch.stack(column), collapsed=True))
    return tree_unflatten(joined, forms[0])
