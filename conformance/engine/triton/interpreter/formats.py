"""Number formats that numpy lacks: bfloat16, the five of 8 bits, and tf32; rounded to nearest, ties to even.

A value of a *narrow* format is held as float32, which has all its values; it is rounded after each operation, and has its own
bits only where something can see them: in memory and in a bitcast.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TF32_DROPPED_BITS = 13  # of float32's 23


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 values rounded to the 10 bits of mantissa that a matrix unit reads under tf32."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    bias = ((bits >> np.uint32(TF32_DROPPED_BITS)) & np.uint32(1)) + np.uint32(2 ** (TF32_DROPPED_BITS - 1) - 1)
    rounded = (bits + bias) & np.uint32(2**32 - 2**TF32_DROPPED_BITS)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def toward_zero(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in a dtype that numpy has, cut off instead of rounded."""
    nearest = values.astype(dtype)
    return np.where(np.abs(nearest) > np.abs(values), np.nextafter(nearest, dtype.type(0)), nearest)


class BFloat16:
    """The upper half of a float32."""

    stored = np.dtype(np.uint16)

    def rounded(self, values: np.ndarray, cut_off: bool = False) -> np.ndarray:
        """The nearest numbers of the format, as float32."""
        wide = values if values.dtype == np.float32 else _to_odd_float32(values)
        bits = np.ascontiguousarray(wide).view(np.uint32)
        if not cut_off:
            bits = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
        result = (bits & np.uint32(0xFFFF0000)).view(np.float32)
        is_nan = np.isnan(wide)
        return np.where(is_nan, np.float32(np.nan), result) if is_nan.any() else result

    def pack(self, values: np.ndarray) -> np.ndarray:
        """The bits of numbers of the format."""
        return (np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)).astype(np.uint16)

    def unpack(self, bits: np.ndarray) -> np.ndarray:
        """The numbers of bits, as float32."""
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_odd_float32(values: np.ndarray) -> np.ndarray:
    """float32 that can be rounded again: what is not exact gets an odd last bit, so that it is never taken for a tie."""
    exact = values.astype(np.float64)
    nearest = exact.astype(np.float32)
    bits = nearest.view(np.uint32)
    other = np.where(np.abs(nearest) > np.abs(exact), bits - np.uint32(1), bits + np.uint32(1))
    inexact_and_even = (nearest != exact) & (bits & np.uint32(1) == 0) & np.isfinite(exact)
    return np.where(inexact_and_even, other, bits).view(np.float32)


@dataclass(frozen=True)
class Float8:
    """A format of 8 bits: a sign, `exponent_bits`, and a mantissa. What is too large is rounded to the largest, as on GPUs."""

    exponent_bits: int
    bias: int
    finite_codes: int
    """How many codes without sign are finite numbers; they count up, and the next, if any, is infinity or NaN."""
    nan: int
    """The code that NaN is stored as."""
    has_infinity: bool = False
    """The code after the finite ones is infinity."""
    unsigned_zero: bool = False
    """There is one zero; the code of -0 is NaN."""

    stored = np.dtype(np.uint8)

    @cached_property
    def _magnitudes(self) -> np.ndarray:
        """The numbers that are finite and not negative, by their codes."""
        mantissa_bits = 7 - self.exponent_bits
        codes = np.arange(self.finite_codes)
        exponents, mantissas = codes >> mantissa_bits, codes % 2**mantissa_bits
        significands = np.where(exponents > 0, 2**mantissa_bits + mantissas, mantissas).astype(np.float64)
        return np.ldexp(significands, np.maximum(exponents, 1) - self.bias - mantissa_bits)

    @cached_property
    def _values(self) -> np.ndarray:
        """The number of each code."""
        magnitudes = np.full(128, np.nan)
        magnitudes[: self.finite_codes] = self._magnitudes
        if self.has_infinity:
            magnitudes[self.finite_codes] = np.inf
        values = np.concatenate([magnitudes, -magnitudes]).astype(np.float32)
        if self.unsigned_zero:
            values[0x80] = np.nan
        return values

    @cached_property
    def _midpoints(self) -> np.ndarray:
        return (self._magnitudes[1:] + self._magnitudes[:-1]) / 2

    def rounded(self, values: np.ndarray, cut_off: bool = False) -> np.ndarray:
        """The nearest numbers of the format, as float32."""
        largest = self._magnitudes[-1]
        wide = np.clip(values.astype(np.float64), -largest, largest)
        if cut_off:
            codes = np.searchsorted(self._magnitudes, np.abs(wide), side="right") - 1
            wide = np.copysign(self._magnitudes[codes], wide)
        return self.unpack(self.pack(wide))

    def pack(self, values: np.ndarray) -> np.ndarray:
        """The bits of the nearest numbers of the format."""
        wide = values.astype(np.float64)
        magnitudes = np.abs(wide)
        below = np.searchsorted(self._midpoints, magnitudes, side="left")
        above = np.searchsorted(self._midpoints, magnitudes, side="right")
        codes = np.where(below % 2 == 0, below, above)  # they differ for ties alone; even codes have even mantissas
        if self.has_infinity:
            codes = np.where(np.isinf(wide), self.finite_codes, codes)
        signs = np.signbit(wide) & ((codes > 0) | (not self.unsigned_zero))
        return np.where(np.isnan(wide), self.nan, codes | (signs.astype(codes.dtype) << 7)).astype(np.uint8)

    def unpack(self, bits: np.ndarray) -> np.ndarray:
        """The numbers of bits, as float32."""
        return self._values[bits]


NARROW: dict[str, BFloat16 | Float8] = {  # by Triton's names
    "bf16": BFloat16(),
    "fp8e4nv": Float8(exponent_bits=4, bias=7, finite_codes=0x7F, nan=0x7F),
    "fp8e5": Float8(exponent_bits=5, bias=15, finite_codes=0x7C, nan=0x7F, has_infinity=True),
    "fp8e4b15": Float8(exponent_bits=4, bias=15, finite_codes=0x80, nan=0x7F),  # it has no NaN
    "fp8e4b8": Float8(exponent_bits=4, bias=8, finite_codes=0x80, nan=0x80, unsigned_zero=True),
    "fp8e5b16": Float8(exponent_bits=5, bias=16, finite_codes=0x80, nan=0x80, unsigned_zero=True),
}
