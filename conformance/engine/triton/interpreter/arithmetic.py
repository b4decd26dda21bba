"""The builder's arithmetic: each operation once for all programs, and rounded to the dtype of its result."""

from collections.abc import Callable
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter as stock

from gaugeblock.conformance.engine.triton.interpreter.formats import round_to_tf32, toward_zero
from gaugeblock.conformance.engine.triton.interpreter.functions import (
    Operation,
    divide_toward_zero,
    erf,
    fused_multiply_add,
    in_float64,
    matrix_product,
    maximum,
    minimum,
    multiply_high,
    rsqrt,
    to_integers,
)
from gaugeblock.conformance.engine.triton.interpreter.handle import (
    Handle,
    common_shape,
    element_of,
    held_dtype,
    narrow_format,
    packed,
    rounded,
    stored_dtype,
    unpacked,
)

UNARY: dict[str, Operation] = {
    "fneg": np.negative,
    "fabs": np.abs,
    "iabs": np.abs,
    "floor": np.floor,
    "ceil": np.ceil,
    "sqrt": np.sqrt,
    "precise_sqrt": np.sqrt,
    "rsqrt": in_float64(rsqrt),
    "exp": in_float64(np.exp),
    "exp2": in_float64(np.exp2),
    "log": in_float64(np.log),
    "log2": in_float64(np.log2),
    "sin": in_float64(np.sin),
    "cos": in_float64(np.cos),
    "erf": in_float64(erf),
}
BINARY: dict[str, Operation] = {
    **dict.fromkeys(("add", "fadd"), np.add),
    **dict.fromkeys(("sub", "fsub"), np.subtract),
    **dict.fromkeys(("mul", "fmul"), np.multiply),
    **dict.fromkeys(("fdiv", "precise_divf", "approx_divf"), np.divide),
    **dict.fromkeys(("sdiv", "udiv"), divide_toward_zero),
    **dict.fromkeys(("frem", "srem", "urem"), np.fmod),
    **dict.fromkeys(("maxsi", "maxui"), np.maximum),
    **dict.fromkeys(("minsi", "minui"), np.minimum),
    "maxnumf": maximum,
    "minnumf": minimum,
    "maximumf": lambda left, right: maximum(left, right, keeps_nan=True),
    "minimumf": lambda left, right: minimum(left, right, keeps_nan=True),
    "umulhi": multiply_high,
    "shl": np.left_shift,
    "lshr": np.right_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    **{f"icmp{sign}{order}": operation for sign in "SU" for order, operation in (
        ("LT", np.less), ("LE", np.less_equal), ("GT", np.greater), ("GE", np.greater_equal)
    )},
    **{f"fcmp{kind}{order}": operation for kind in "OU" for order, operation in (
        ("LT", np.less), ("LE", np.less_equal), ("GT", np.greater), ("GE", np.greater_equal), ("EQ", np.equal),
        ("NE", np.not_equal),
    )},
    "icmpEQ": np.equal,
    "icmpNE": np.not_equal,
}  # fmt: skip


def unary(operation: Operation) -> Callable[[Any, Handle], Handle]:
    """A builder's method from a function of arrays."""
    return lambda builder, value: rounded(operation(value.data), value.dtype, value.shape)


def binary(operation: Operation) -> Callable[[Any, Handle, Handle], Handle]:
    """A builder's method from a function of two arrays."""

    def method(builder: Any, left: Handle, right: Handle) -> Handle:
        x, y, shape = left.data, right.data, common_shape(left, right)
        if x.dtype.kind == y.dtype.kind == "b":  # integers of one bit, which wrap; for numpy True + True is True
            bits = operation(x.astype(np.int8), y.astype(np.int8))
            return Handle(bits if bits.dtype.kind == "b" else (bits & 1).astype(np.bool_), tl.int1, shape)
        return rounded(operation(x, y), left.dtype, shape)

    return method


def cast(builder: Any, value: Handle, to: Any, *signed: Any) -> Handle:
    """A builder's method that turns numbers into others of nearly the same value."""
    data, dtype = value.data, held_dtype(to)
    if data.dtype.kind == "f" and dtype.kind in "iu":
        return Handle(to_integers(data, dtype), to.scalar, value.shape)
    if narrow_format(to) is None:
        return Handle(data.astype(dtype, copy=False), to.scalar, value.shape)
    exact = data if data.dtype.kind == "f" else data.astype(np.float64)
    return rounded(exact, to, value.shape)


def moved(addresses: np.ndarray, offsets: np.ndarray, pointer: Any) -> np.ndarray:
    """Addresses so many elements further on."""
    if pointer.name not in _STEPS:
        _STEPS[pointer.name] = np.uint64(stored_dtype(element_of(pointer)).itemsize)
    return addresses + _STEPS[pointer.name] * offsets.astype(np.uint64)


_STEPS: dict[str, np.uint64] = {}  # the bytes of an element, by a pointer's name


class Arithmetic:
    """The builder's operations on numbers."""

    create_si_to_fp = create_ui_to_fp = create_fp_to_si = create_fp_to_ui = cast
    create_fp_ext = create_fp_trunc = create_int_cast = cast

    def create_fp_to_fp(self, value: Handle, to: Any, rounding_mode: Any) -> Handle:
        if rounding_mode != stock._ir.ROUNDING_MODE.RTZ:
            return cast(self, value, to)
        narrow = narrow_format(to)
        data = toward_zero(value.data, held_dtype(to)) if narrow is None else narrow.rounded(value.data, cut_off=True)
        return Handle(data, to.scalar, value.shape)

    def create_bitcast(self, value: Handle, to: Any) -> Handle:
        data = np.ascontiguousarray(packed(value)).view(stored_dtype(to))
        return unpacked(data, to, value.shape)

    create_int_to_ptr = create_ptr_to_int = create_bitcast

    def create_addptr(self, pointers: Handle, offsets: Handle) -> Handle:
        return Handle(moved(pointers.data, offsets.data, pointers.dtype), pointers.dtype, common_shape(pointers, offsets))

    def create_ashr(self, left: Handle, right: Handle) -> Handle:
        signed = np.dtype(f"int{8 * left.data.itemsize}")
        shifted = np.right_shift(left.data.astype(signed), right.data.astype(signed))
        return Handle(shifted.astype(left.data.dtype), left.dtype.scalar, common_shape(left, right))

    def create_select(self, condition: Handle, left: Handle, right: Handle) -> Handle:
        data = np.where(condition.data, left.data, right.data)
        return Handle(data, left.dtype.scalar, common_shape(condition, left, right))

    def create_clampf(self, value: Handle, low: Handle, high: Handle, propagate_nans: Any) -> Handle:
        keeps_nan = propagate_nans != stock._ir.PROPAGATE_NAN.NONE
        data = minimum(maximum(value.data, low.data, keeps_nan), high.data, keeps_nan)
        return rounded(data, value.dtype, common_shape(value, low, high))

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        is_wide = z.data.dtype == np.float64
        data = x.data * y.data + z.data if is_wide else fused_multiply_add(x.data, y.data, z.data)
        return rounded(data, z.dtype, common_shape(x, y, z))

    def create_dot(self, left: Handle, right: Handle, start: Handle, input_precision: Any, max_num_imprecise_acc: Any) -> Handle:
        """left @ right + start, of operands rounded as `input_precision` says."""
        a, b, precisions = left.full, right.full, stock._ir.INPUT_PRECISION
        if left.dtype != tl.float32 or input_precision == precisions.IEEE:
            product = matrix_product(a, b)
        elif input_precision == precisions.TF32:
            product = matrix_product(round_to_tf32(a), round_to_tf32(b))
        else:  # tf32x3: what rounding leaves of an operand is multiplied as well
            a_high, b_high = round_to_tf32(a), round_to_tf32(b)
            a_low, b_low = round_to_tf32(a - a_high), round_to_tf32(b - b_high)
            product = matrix_product(a_low, b_high) + matrix_product(a_high, b_low) + matrix_product(a_high, b_high)
        return rounded(product + start.full, start.dtype, start.shape)

    def get_bf16(self, value: float) -> Handle:
        return rounded(np.array([value], np.float64), tl.bfloat16)

    def get_null_value(self, dtype: Any) -> Handle:
        return Handle(np.zeros(1, held_dtype(dtype)), dtype.scalar)


for _name, _operation in UNARY.items():
    setattr(Arithmetic, f"create_{_name}", unary(_operation))
for _name, _operation in BINARY.items():
    setattr(Arithmetic, f"create_{_name}", binary(_operation))
