"""`tl.reduce` and `tl.associative_scan`, in an order that depends on the length alone."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from triton import language as tl

from gaugeblock.conformance.engine.triton.interpreter.functions import maximum, minimum
from gaugeblock.conformance.engine.triton.interpreter.handle import Handle, narrow_format, rounded

Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]


def reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: Any = False, **_: Any) -> Any:
    """`tl.reduce` of blocks [programs, ...]."""
    inputs = input if isinstance(input, tuple) else (input,)
    axis, keep_dims = _plain(axis), _plain(keep_dims)
    shape = inputs[0].handle.shape
    arrays = _same_programs(inputs)
    if axis is None:
        arrays = [each.reshape(each.shape[0], math.prod(shape)) for each in arrays]
        where, left = 1, (1,) * len(shape) if keep_dims else ()
    else:
        axis %= len(shape)
        where, left = axis + 1, (*shape[:axis], *((1,) if keep_dims else ()), *shape[axis + 1 :])
    results = _reduced(arrays, where, combine_fn, [each.dtype for each in inputs])
    reduced = [_tensor(data.reshape(-1, *left), each.dtype) for data, each in zip(results, inputs, strict=True)]
    return tuple(reduced) if isinstance(input, tuple) else reduced[0]


def _reduced(arrays: list[np.ndarray], axis: int, combine_fn: Any, dtypes: list[Any]) -> list[np.ndarray]:
    known = tl.standard
    if combine_fn is known._sum_combine:
        return [_fold(arrays[0], axis, _sum_in(dtypes[0]))]
    if combine_fn is known._elementwise_max:
        return [_fold(arrays[0], axis, maximum)]
    if combine_fn is known._elementwise_min:
        return [_fold(arrays[0], axis, minimum)]
    if combine_fn in (known._argmax_combine_tie_break_left, known._argmax_combine_tie_break_fast):
        return _extreme(arrays, axis, np.argmax, -np.inf)
    if combine_fn in (known._argmin_combine_tie_break_left, known._argmin_combine_tie_break_fast):
        return _extreme(arrays, axis, np.argmin, np.inf)
    while arrays[0].shape[axis] > 1:  # neighbours, then pairs of neighbours: operands stay in their order
        even, odd = ([np.take(each, range(first, each.shape[axis], 2), axis) for each in arrays] for first in (0, 1))
        arrays = _combined(combine_fn, even, odd, dtypes)
    return arrays


def _fold(data: np.ndarray, axis: int, combine: Combine) -> np.ndarray:
    """Combines the halves, and their halves, to the end: blocks have a power of two of elements along each axis."""
    along = (slice(None),) * axis
    while data.shape[axis] > 1:
        half = data.shape[axis] // 2
        data = combine(data[(*along, slice(half))], data[(*along, slice(half, None))])
    return data


def _sum_in(dtype: Any) -> Combine:
    return lambda left, right: rounded(np.bitwise_xor(left, right) if left.dtype == np.bool_ else left + right, dtype).data


def _extreme(arrays: list[np.ndarray], axis: int, pick: Any, worst: float) -> list[np.ndarray]:
    """The first extreme and what belongs to it; NaN is skipped, and nothing but NaN has index 0."""
    values = arrays[0]
    clean = np.where(np.isnan(values), values.dtype.type(worst), values) if values.dtype.kind == "f" else values
    where = pick(clean, axis=axis, keepdims=True)
    if clean is not values:
        where = np.where(np.isnan(values).all(axis=axis, keepdims=True), 0, where)
    return [np.take_along_axis(each, where, axis) for each in arrays]


def associative_scan(input: Any, axis: Any, combine_fn: Any, reverse: Any = False, **_: Any) -> Any:
    """`tl.associative_scan` of blocks [programs, ...]."""
    inputs = input if isinstance(input, tuple) else (input,)
    reverse, where = _plain(reverse), _plain(axis) % len(inputs[0].handle.shape) + 1
    arrays = [np.flip(each, where) if reverse else each for each in _same_programs(inputs)]
    is_plain = narrow_format(inputs[0].dtype) is None
    if is_plain and combine_fn is tl.standard._sum_combine:
        arrays = [np.cumsum(arrays[0], axis=where, dtype=arrays[0].dtype)]
    elif is_plain and combine_fn is tl.standard._prod_combine:
        arrays = [np.cumprod(arrays[0], axis=where, dtype=arrays[0].dtype)]
    else:
        arrays = _scanned(arrays, where, combine_fn, [each.dtype for each in inputs])
    arrays = [np.flip(each, where) if reverse else each for each in arrays]
    scanned = [_tensor(data, each.dtype) for data, each in zip(arrays, inputs, strict=True)]
    return tuple(scanned) if isinstance(input, tuple) else scanned[0]


def _scanned(arrays: list[np.ndarray], axis: int, combine_fn: Any, dtypes: list[Any]) -> list[np.ndarray]:
    """Combines each with the one 1, 2, 4, ... before it."""
    length = arrays[0].shape[axis]
    position = np.arange(length).reshape(-1, *(1,) * (arrays[0].ndim - axis - 1))
    distance = 1
    while distance < length:
        earlier = [np.roll(each, distance, axis) for each in arrays]  # whole blocks, since their sizes are powers of two
        combined = _combined(combine_fn, earlier, arrays, dtypes)
        arrays = [np.where(position < distance, old, new) for old, new in zip(arrays, combined, strict=True)]
        distance *= 2
    return arrays


def _combined(combine_fn: Any, left: list[np.ndarray], right: list[np.ndarray], dtypes: list[Any]) -> list[np.ndarray]:
    """A combine function of a kernel applied to arrays [programs, ...] of one shape."""
    operands = [_tensor(data, dtype) for side in (left, right) for data, dtype in zip(side, dtypes, strict=True)]
    results = combine_fn(*operands)
    results = results if isinstance(results, tuple) else (results,)
    return [np.broadcast_to(each.handle.full, data.shape).astype(data.dtype) for each, data in zip(results, left, strict=True)]


def _same_programs(tensors: Any) -> list[np.ndarray]:
    count = max(each.handle.data.shape[0] for each in tensors)
    return [each.handle.for_programs(count) for each in tensors]


def _tensor(data: np.ndarray, dtype: Any) -> Any:
    shape = data.shape[1:]
    return tl.core.tensor(Handle(data, dtype.scalar), tl.block_type(dtype.scalar, list(shape)) if shape else dtype.scalar)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, tl.constexpr) else value
