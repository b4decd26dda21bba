"""The value of a tensor in all programs at once."""

from typing import Any

import numpy as np
from triton import language as tl

from gaugeblock.conformance.engine.triton.interpreter.formats import NARROW, BFloat16, Float8

_NUMPY = {
    **{name: np.dtype(name) for name in "int8 int16 int32 int64 uint8 uint16 uint32 uint64".split()},
    "int1": np.dtype(np.bool_),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
    "fp64": np.dtype(np.float64),
}
_ADDRESS = np.dtype(np.uint64)
_HELD = _NUMPY | dict.fromkeys(NARROW, np.dtype(np.float32))
_STORED = _NUMPY | {name: narrow.stored for name, narrow in NARROW.items()}


class Handle:
    """What a `tl.tensor` has in place of a value of Triton's intermediate representation.

    Attributes:
        data: [programs, *shape]; any axis may be 1 instead, where all along it is the same: of the programs, what they agree on,
            and of the block, what was broadcast. So a mask of a column costs a column, and most of a kernel is computed once.
        dtype: Of an element: a scalar type or a pointer's.
        shape: Of the block; () for a scalar.
    """

    __slots__ = ("data", "dtype", "shape")

    def __init__(self, data: np.ndarray, dtype: Any, shape: tuple[int, ...] | None = None) -> None:
        self.data, self.dtype = data, dtype
        self.shape = data.shape[1:] if shape is None else shape

    @property
    def full(self) -> np.ndarray:
        """The data with every axis of the block as long as it is."""
        return self.for_programs(self.data.shape[0])

    def for_programs(self, count: int) -> np.ndarray:
        """The data with all axes as long as they are; not to be written to."""
        shape = (count, *self.shape)
        return self.data if self.data.shape == shape else np.broadcast_to(self.data, shape)

    @property
    def scalars(self) -> np.ndarray:
        """[programs or 1], of a scalar or a block of one element."""
        return self.data.reshape(-1)

    def __bool__(self) -> bool:
        return bool(self.data.all())

    def get_element_ty(self) -> Any:
        """What a pointer points to, or the dtype."""
        return element_of(self.dtype)

    def set_attr(self, key: str, value: Any) -> None:
        """Forgets a hint for the compiler."""


def element_of(dtype: Any) -> Any:
    """What a pointer points to, or the dtype."""
    while hasattr(dtype, "element_ty"):
        dtype = dtype.element_ty
    return dtype


def common_shape(first: Handle, *others: Handle) -> tuple[int, ...]:
    """The shape of an elementwise result."""
    shape = first.shape
    for other in others:
        if other.shape != shape:
            return np.broadcast_shapes(shape, *(each.shape for each in others))
    return shape


def narrow_format(dtype: Any) -> BFloat16 | Float8 | None:
    """How numbers of a scalar type that numpy lacks are rounded, or None."""
    return NARROW.get(dtype.scalar.name)


def held_dtype(dtype: Any) -> np.dtype:
    """Of the data of a handle."""
    return _HELD.get(dtype.scalar.name, _ADDRESS)


def stored_dtype(dtype: Any) -> np.dtype:
    """Of an element in memory."""
    return _STORED.get(dtype.scalar.name, _ADDRESS)


def packed(handle: Handle) -> np.ndarray:
    """The data as it is in memory."""
    narrow = narrow_format(handle.dtype)
    return handle.data if narrow is None else narrow.pack(handle.data)


def unpacked(data: np.ndarray, dtype: Any, shape: tuple[int, ...] | None = None) -> Handle:
    """What memory holds, as a handle."""
    narrow = narrow_format(dtype)
    return Handle(data if narrow is None else narrow.unpack(data), dtype.scalar, shape)


def rounded(data: np.ndarray, dtype: Any, shape: tuple[int, ...] | None = None) -> Handle:
    """What an operation computed, perhaps in a wider dtype, in the dtype of its result."""
    if data.dtype.kind == "b":
        return Handle(data, tl.int1, shape)
    scalar = dtype.scalar
    narrow = NARROW.get(scalar.name)
    data = data.astype(_HELD.get(scalar.name, _ADDRESS), copy=False) if narrow is None else narrow.rounded(data)
    return Handle(data, scalar, shape)
