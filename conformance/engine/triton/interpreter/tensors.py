"""The tensors that kernels see: Triton's, whose operators take no detour where nothing is to be decided.

Triton's way from `x + y` to the builder leads through a dozen functions that look for pointers, constants, other dtypes and other
shapes. It is what a launch spends most of its time on, and for most operands they find nothing. Those operands go straight to the
arithmetic; all others, and all mistakes, go Triton's way.
"""

import math
import operator
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter as stock

from gaugeblock.conformance.engine.triton.interpreter.arithmetic import moved
from gaugeblock.conformance.engine.triton.interpreter.functions import Operation
from gaugeblock.conformance.engine.triton.interpreter.handle import Handle, held_dtype, rounded

SEMANTIC = stock.interpreter_semantic
FLOATS = {each.name: each for each in (tl.float16, tl.bfloat16, tl.float32, tl.float64)}
INTEGERS = {each.name: each for each in (tl.int8, tl.int16, tl.int32, tl.int64)}  # of one sign: the wider holds both
NUMBERS = FLOATS | INTEGERS
_ALL = slice(None)


class Tensor(tl.tensor):
    """`tl.tensor` during a launch. All of them are of this class, so that no attribute of Triton's need be exchanged."""

    def __init__(self, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.sizes_of_tensor if type.is_block() else _SCALAR

    def __index__(self) -> Any:
        return SEMANTIC.builder.agreement.agree_on(self.handle.scalars)

    def __bool__(self) -> bool:
        """Of a scalar, what all programs have; a block is true, as in Triton's interpreter."""
        return SEMANTIC.builder.agreement.agree_on(self.handle.scalars != 0) if self.numel.value == 1 else True

    def __repr__(self) -> str:
        return repr(self.handle.full)

    def __str__(self) -> str:
        return str(self.handle.full)

    @property
    def T(self) -> Any:
        """The last two axes exchanged."""
        *others, rows, columns = self.handle.shape
        order = (*range(len(others)), len(others) + 1, len(others))
        return Tensor(SEMANTIC.builder.create_trans(self.handle, order), block(self.dtype, (*others, columns, rows)))


# In messages it has Triton's name.
Tensor.__name__, Tensor.__qualname__, Tensor.__module__ = tl.tensor.__name__, tl.tensor.__qualname__, tl.tensor.__module__


def sizes_of_tensor(shape: tuple[int, ...]) -> tuple[Any, Any]:
    """`shape` and `numel` of a tensor."""
    return tl.core.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


_SCALAR = sizes_of_tensor(())


_blocks: dict[tuple[str, tuple[int, ...]], Any] = {}


def block(element: Any, shape: tuple[int, ...]) -> Any:
    """The block type of a shape, made once: a kernel has a few, and asks for one in every operation."""
    key = element.name, shape
    known = _blocks.get(key)
    if known is None or known.element_ty is not element:  # pointers of one name may differ
        known = _blocks[key] = tl.block_type(element, shape)
    return known


def of(handle: Handle, dtype: Any) -> Tensor:
    return Tensor(handle, block(dtype, handle.shape) if handle.shape else dtype)


def _alike(tensor: Tensor, handle: Handle) -> Tensor:
    """A tensor of the same type."""
    result = Tensor.__new__(Tensor)
    result.handle, result.type, result.dtype = handle, tensor.type, tensor.dtype
    result.shape, result.numel = tensor.shape, tensor.numel
    return result


@cache
def broadcast_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of an operation on shapes that differ; None where Triton has something to say."""
    if left and right:
        if len(left) != len(right) or any(m != n and m != 1 and n != 1 for m, n in zip(left, right, strict=True)):
            return None
        return tuple(max(sizes) for sizes in zip(left, right, strict=True))
    return left or right


def spread(data: np.ndarray, rank: int) -> np.ndarray:
    """A block's data; a scalar's with axes as those of a block."""
    return data if data.ndim == rank + 1 else data.reshape(-1, *(1,) * rank)


def constant_beside(tensor: Tensor, value: Any, operation: Callable) -> Tensor | None:
    """A number of Python as Triton takes it beside a tensor, in the tensor's dtype.

    Args:
        operation: Triton's, of both.

    Returns:
        None if it is no number, or the operation casts the tensor.
    """
    is_number = type(value) is int or type(value) is float
    return _constant(operation, tensor.dtype.name, value, sign(value)) if is_number else None


def sign(value: float) -> float:
    """What tells 0.0 from -0.0, which are equal."""
    return 1.0 if value else math.copysign(1.0, value)


@lru_cache(4096, typed=True)
def _constant(operation: Callable, dtype: str, value: float, _sign: float) -> Tensor | None:
    """Found out by trying: to compare, Triton 3.6 first makes a tensor of the number, in a dtype of its own."""
    if dtype not in NUMBERS:
        return None
    scalar = NUMBERS[dtype]
    beside = Tensor(Handle(np.zeros(1, held_dtype(scalar)), scalar), scalar)
    pairs: list[tuple[Any, Any]] = []

    def look(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        pairs.append(type(SEMANTIC).binary_op_type_checking_impl(SEMANTIC, *arguments, **options))
        return pairs[-1]

    ours, SEMANTIC.binary_op_type_checking_impl = SEMANTIC.binary_op_type_checking_impl, look
    try:
        operation(beside, value)
    except Exception:  # Triton says so again when asked for the operation itself
        return None
    finally:
        SEMANTIC.binary_op_type_checking_impl = ours
    if len(pairs) != 1:
        return None
    left, right = pairs[0]
    constant = right if left is beside else left
    return constant if (left is beside or right is beside) and constant.dtype is scalar else None


# Of each operator what is done to numbers: to those of one dtype, and to integers of two.
_ARITHMETIC: dict[str, Operation] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_COMPARISON: dict[str, Operation] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_BITWISE: dict[str, Operation] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _results(operation: Operation) -> dict[tuple[str, str], Any]:
    """By the names of two dtypes that of the result, before a comparison makes it a truth value."""
    if operation in _BITWISE.values():
        return {(name, name): dtype for name, dtype in (INTEGERS | {"int1": tl.int1}).items()}
    wider = {
        (one.name, other.name): max(one, other, key=operator.attrgetter("int_bitwidth"))
        for one in INTEGERS.values()
        for other in INTEGERS.values()
    }
    return wider | {(name, name): dtype for name, dtype in FLOATS.items()}


def _operator(operation: Operation, original: Callable, reflected: bool) -> Callable:
    """A method of `Tensor` such as `__add__`."""
    results, adds = _results(operation), operation is np.add and not reflected
    takes_constants = operation not in _BITWISE.values()

    def operate(self: Tensor, given: Any) -> Any:
        other = given
        if type(other) is tl.constexpr:
            other = other.value
        if type(other) is not Tensor:
            other = constant_beside(self, other, original) if takes_constants else None
            if other is None:
                return original(self, given)
        dtype = results.get((self.dtype.name, other.dtype.name))
        if dtype is None and not (adds and other.dtype.name in INTEGERS and self.dtype.is_ptr()):
            return original(self, given)
        left, right = self.handle, other.handle
        x, y, shape = left.data, right.data, left.shape
        if shape != right.shape:
            common = broadcast_shape(shape, right.shape)
            if common is None:
                return original(self, given)
            shape = common
            x = x if x.size == 1 else spread(x, len(shape))
            y = y if y.size == 1 else spread(y, len(shape))
        if dtype is None:
            return _typed(Handle(moved(x, y, self.dtype), self.dtype, shape), self.dtype, self)
        handle = rounded(operation(y, x) if reflected else operation(x, y), dtype, shape)
        return _typed(handle, handle.dtype, self)

    return operate


def _typed(handle: Handle, dtype: Any, like: Tensor) -> Tensor:
    return _alike(like, handle) if dtype is like.dtype and handle.shape == like.handle.shape else of(handle, dtype)


def _item(original: Callable) -> Callable:
    """`__getitem__`, which adds axes."""

    def item(self: Tensor, slices: Any) -> Any:
        if type(slices) is not tuple or not self.handle.shape:
            return original(self, slices)
        old, shape = iter(self.handle.shape), []
        for each in slices:
            if each is None:
                shape.append(1)
            elif type(each) is slice and each.start is None and each.stop is None and each.step is None:
                size = next(old, None)
                if size is None:
                    return original(self, slices)
                shape.append(size)
            else:
                return original(self, slices)
        return of(Handle(self.handle.data[(_ALL, *slices)], self.handle.dtype, (*shape, *old)), self.dtype)

    return item


def add_methods(methods: dict[str, Callable]) -> None:
    """Gives `Tensor` the builtins of `tl.tensor`, which speak to our builder, and the operators their short ways."""
    for name, method in methods.items():
        setattr(Tensor, name, method)
    for name, operation in (_ARITHMETIC | _COMPARISON | _BITWISE).items():
        for reflected in (False, True):
            dunder = f"__{'r' * reflected}{name}__"
            if dunder in methods:
                setattr(Tensor, dunder, _operator(operation, methods[dunder], reflected))
    Tensor.__getitem__ = _item(methods["__getitem__"])
