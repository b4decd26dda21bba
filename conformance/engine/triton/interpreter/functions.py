"""Arithmetic whose bits are the same on every CPU: functions, products of matrices, and casts of numbers to integers.

numpy's float32 functions have a code of their own for AVX-512, for AVX2 and for neither, and BLAS chooses an order of summation
by the number of rows and by the CPU. Here functions are computed in float64 and rounded, and sums have one order.
"""

import math
from collections.abc import Callable

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]
Operation = Callable[..., np.ndarray]


def in_float64(function: Function) -> Function:
    """The function, computed in float64; the caller rounds."""
    return lambda values: function(values.astype(np.float64, copy=False))


erf: Function = np.vectorize(math.erf, otypes=[np.float64])


def rsqrt(values: np.ndarray) -> np.ndarray:
    """1 / sqrt(values)."""
    return 1.0 / np.sqrt(values)


def maximum(left: np.ndarray, right: np.ndarray, keeps_nan: bool = False) -> np.ndarray:
    """The larger; of zeros of both signs the positive, where numpy's choice depends on the CPU."""
    larger = (np.maximum if keeps_nan else np.fmax)(left, right)
    if larger.dtype.kind != "f" or (larger != 0).all():
        return larger
    return np.where((left == 0) & (right == 0), left + right, larger)


def minimum(left: np.ndarray, right: np.ndarray, keeps_nan: bool = False) -> np.ndarray:
    """The smaller; of zeros of both signs the negative."""
    if left.dtype.kind != "f":
        return np.minimum(left, right)
    return -maximum(-left, -right, keeps_nan)


def fused_multiply_add(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32 or less, in float64 that can be rounded as if it were exact.

    The product is exact; of the sum the bits that are lost are made to show in the last bit, so that it is never taken for a tie.
    """
    product = x.astype(np.float64) * y
    total = product + z
    share = total - product
    lost = (product - (total - share)) + (z - share)
    is_even = np.ascontiguousarray(total).view(np.int64) & 1 == 0
    nudged = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where(is_even & (lost != 0) & np.isfinite(lost), nudged, total)


def divide_toward_zero(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left / right of integers, as a GPU cuts it off."""
    return (left - np.fmod(left, right)) // right


def multiply_high(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The upper half of the product of integers, taken as unsigned."""
    dtype, width = left.dtype, 8 * left.dtype.itemsize
    unsigned = np.dtype(f"uint{width}")
    x, y = (np.ascontiguousarray(each).view(unsigned) for each in (left, right))
    if width < 64:
        wide = np.dtype(f"uint{2 * width}")
        return (x.astype(wide) * y >> wide.type(width)).astype(unsigned).view(dtype)
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    x_high, x_low, y_high, y_low = x >> half, x & low, y >> half, y & low
    middle = x_high * y_low + (x_low * y_low >> half)  # never more than 64 bits
    return (x_high * y_high + (middle >> half) + ((middle & low) + x_low * y_high >> half)).view(dtype)


def to_integers(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers cut off; what does not fit becomes the nearest that does, and NaN 0, as on a GPU. C leaves it to the CPU."""
    info = np.iinfo(dtype)
    lowest, above = float(info.min), float(info.max) + 1 if dtype.itemsize < 8 else 2.0 ** (63 + (dtype.kind == "u"))
    wide = values.astype(np.float64, copy=False)
    fits = (wide > lowest - 1) & (wide < above)
    if fits.all():
        return wide.astype(dtype)
    edges = np.where(np.isnan(wide), 0, np.where(wide > 0, info.max, info.min).astype(dtype))
    return np.where(fits, np.where(fits, wide, 0).astype(dtype), edges)


def matrix_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[..., m, k] @ [..., k, n], summed in the order of k whatever the shapes and the CPU: in integers, or in float64.

    In float64 products of float32 and less are exact, so that nothing depends on whether a CPU multiplies and adds in one. With a
    contiguous right operand of at least two columns, einsum's innermost loop is over columns; a lone column is repeated.
    """
    if left.dtype.kind in "iub":
        return np.matmul(left, right, dtype=np.int32)  # not BLAS, and exact
    if left.dtype == np.float64:  # products are rounded, so no loop may fuse them with sums
        return sum_in_order(left[..., :, k, None] * right[..., None, k, :] for k in range(left.shape[-1]))
    a, b = np.ascontiguousarray(left, np.float64), np.ascontiguousarray(right, np.float64)
    if b.shape[-1] == 1:
        return matrix_product(left, np.repeat(right, 2, axis=-1))[..., :1]
    return np.einsum("...mk,...kn->...mn", a, b)


def sum_in_order(terms: object) -> np.ndarray:
    """The sum of arrays, one after another."""
    return sum(terms)  # type: ignore[call-overload]
