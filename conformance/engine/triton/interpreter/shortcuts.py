"""What Triton's functions do for plain arguments, by the short way: nothing here decides anything that Triton would decide.

Each takes Triton's own function, which all other arguments go to, and so do mistakes.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from triton import language as tl

from gaugeblock.conformance.engine.triton.interpreter.arithmetic import cast
from gaugeblock.conformance.engine.triton.interpreter.handle import Handle
from gaugeblock.conformance.engine.triton.interpreter.tensors import (
    FLOATS,
    INTEGERS,
    NUMBERS,
    SEMANTIC,
    Tensor,
    broadcast_shape,
    constant_beside,
    of,
    sign,
    spread,
)


def broadcasting(original: Callable) -> Callable:
    """`broadcast_impl_value`, which copies nothing: an axis that is repeated stays 1 in the data."""

    def spread_to(tensor: Any, shape: tuple[int, ...]) -> Any:
        handle = tensor.handle
        if handle.shape == shape:
            return tensor
        return of(Handle(spread(handle.data, len(shape)), handle.dtype, shape), tensor.dtype)

    def broadcast(lhs: Any, rhs: Any) -> tuple[Any, Any]:
        left, right = lhs.handle.shape, rhs.handle.shape
        if left == right:
            return lhs, rhs
        shape = broadcast_shape(left, right)
        return original(lhs, rhs) if shape is None else (spread_to(lhs, shape), spread_to(rhs, shape))

    return broadcast


def checking(original: Callable) -> Callable:
    """`binary_op_type_checking_impl`, which for operands of one dtype has only to broadcast them."""

    def check(
        lhs: Any, rhs: Any, allow_lhs_ptr: Any = False, allow_rhs_ptr: Any = False, arithmetic_check: Any = True,
        div_or_mod: Any = False,
    ) -> tuple[Any, Any]:  # fmt: skip
        if not div_or_mod:
            left, right = lhs, rhs
            if type(left) is not Tensor and type(right) is Tensor and arithmetic_check:
                left = constant_beside(right, left, _check)
            elif type(right) is not Tensor and type(left) is Tensor and arithmetic_check:
                right = constant_beside(left, right, _check)
            if type(left) is Tensor and type(right) is Tensor and left.dtype is right.dtype and left.dtype.name in NUMBERS:
                return SEMANTIC.broadcast_impl_value(left, right)
        return original(lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return check


def _check(left: Any, right: Any) -> Any:
    return SEMANTIC.binary_op_type_checking_impl(left, right)


def casting(original: Callable) -> Callable:
    """`cast`, which knows where there is nothing to do, and where the builder rounds and nothing else happens."""

    def to(input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        source, target = input.dtype, dst_ty.scalar
        if source is target:
            return input
        if fp_downcast_rounding is None and (source.name, target.name) in _PLAIN_CASTS:
            return of(cast(None, input.handle, target), target)
        return original(input, dst_ty, fp_downcast_rounding)

    return to


_PLAIN_CASTS = {
    *((one, other) for one in INTEGERS for other in INTEGERS),
    *((one, other) for one in INTEGERS for other in FLOATS),
    *(pair for narrow in ("fp16", "bf16") for pair in ((narrow, "fp32"), ("fp32", narrow))),
}


def converting(original: Callable) -> Callable:
    """`to_tensor`, which kernels call in every assignment."""

    @lru_cache(4096, typed=True)
    def number(value: float, _sign: float) -> Any:
        return original(value, True)

    def to_tensor(x: Any, check_type: bool = True) -> Any:
        if type(x) is Tensor:
            return x
        if type(x) is int or type(x) is float:
            return number(x, sign(x))
        return original(x, check_type)

    return to_tensor


def loading(original: Callable) -> Callable:
    """`tl.load` of numbers by nothing but pointers, a mask and what is outside of it."""

    def load(pointer: Any, mask: Any = None, other: Any = None, **options: Any) -> Any:
        if options or type(pointer) is not Tensor or not pointer.dtype.is_ptr() or pointer.dtype.element_ty.name not in NUMBERS:
            return original(pointer, mask, other, **options)
        element, builder = pointer.dtype.element_ty, SEMANTIC.builder
        if mask is None and other is None:
            return of(builder.create_load(pointer.handle), element)
        # Triton asks a scalar for its truth, and so the programs to agree
        if type(mask) is not Tensor or not pointer.handle.shape or (other is not None and pointer.numel.value == 1):
            return original(pointer, mask, other)
        pointer, mask = SEMANTIC.broadcast_impl_value(pointer, mask)
        if type(other) is tl.constexpr:
            other = other.value
        if other is not None:
            pointer, other = SEMANTIC.broadcast_impl_value(pointer, SEMANTIC.to_tensor(other))
            other = SEMANTIC.cast(other, element).handle
        return of(builder.create_masked_load(pointer.handle, mask.handle, other), element)

    return load


def kept(original: Callable) -> Callable:
    """A function of integers that the compiler knows, asked once: what it returns, nothing changes."""
    known = lru_cache(64, typed=True)(original)  # few, since a range may take megabytes

    def function(*values: Any, **rest: Any) -> Any:
        plain = [each.value if type(each) is tl.constexpr else each for each in values]
        return original(*values, **rest) if rest or not all(type(each) is int for each in plain) else known(*plain)

    return function


_PLAIN = {Tensor, int, float, bool, str, type(None), tl.dtype}


def unwrapping(original: Callable) -> Callable:
    """`_unwrap_if_constexpr`, which every function calls on each argument."""
    return lambda o: o if type(o) in _PLAIN else original(o)


def equality(original: Callable) -> Callable:
    """`tl.dtype.__eq__`."""
    return lambda self, other: self.name == other.name if type(other) is tl.dtype else original(self, other)
