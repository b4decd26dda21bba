"""CUDA's library of functions of numbers, as kernels call it: `libdevice.rsqrt`, `libdevice.tanh`, …

`triton.language.extra.libdevice` has only their names, and empty bodies: a compiler takes each from its chip's library. Here they
are NVIDIA's, which take the dtypes that theirs take, and no others: `rsqrt` of bfloat16 is refused, as on a GPU. Each is rounded
once, also those that promise less (`fast_expf`): what is right within that bound is right with any library.
"""

import math
from typing import Any

import numpy as np
from triton import language as tl

from gaugeblock.conformance.engine.triton.interpreter.control_flow import Unbatched
from gaugeblock.conformance.engine.triton.interpreter.functions import Operation, erf, maximum, minimum, rsqrt, to_integers
from gaugeblock.conformance.engine.triton.interpreter.handle import Handle, common_shape, held_dtype, rounded

PREFIX = "__nv_"


def round_half_away(values: np.ndarray) -> np.ndarray:
    """To integers, halves away from 0, as C's `round`."""
    whole = np.trunc(values)
    return np.where(np.abs(values - whole) >= 0.5, whole + np.copysign(1, values), whole)


FUNCTIONS: dict[str, Operation] = {
    **{name: getattr(np, name) for name in (
        "sqrt cbrt exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh floor ceil trunc rint fabs hypot fmod copysign"
    ).split()},
    **{f"a{name}": getattr(np, f"arc{name}") for name in "sin cos tan sinh cosh tanh".split()},
    **{f"fast_{name}": getattr(np, name) for name in "exp log log2 log10 sin cos tan".split()},
    **dict.fromkeys(("exp10", "fast_exp10"), lambda values: np.power(10.0, values)),
    **dict.fromkeys(("pow", "fast_pow", "powi"), np.power),
    **dict.fromkeys(("rsqrt", "frsqrt_rn"), rsqrt),
    **dict.fromkeys(("fsqrt_rn", "dsqrt_rn"), np.sqrt),
    **dict.fromkeys(("frcp_rn", "drcp_rn"), np.reciprocal),
    **dict.fromkeys(("fdiv_rn", "ddiv_rn", "fast_fdivide"), np.divide),
    **dict.fromkeys(("round", "llround"), round_half_away),
    **dict.fromkeys(("nearbyint", "llrint", "float2int_rn", "double2int_rn", "float2ll_rn", "double2ll_rn"), np.rint),
    **dict.fromkeys(("isnan", "isnand"), np.isnan),
    **dict.fromkeys(("isinf", "isinfd"), np.isinf),
    **dict.fromkeys(("finite", "isfinited"), np.isfinite),
    **dict.fromkeys(("signbit", "signbitd"), np.signbit),
    "rcbrt": lambda values: 1.0 / np.cbrt(values),
    "atan2": np.arctan2,
    "erf": erf,
    "erfc": np.vectorize(math.erfc, otypes=[np.float64]),
    "fdim": lambda left, right: np.where(np.isnan(left) | np.isnan(right), np.nan, np.where(left > right, left - right, 0.0)),
    "saturate": lambda values: minimum(maximum(values, np.zeros(1)), np.ones(1)),
}  # fmt: skip
"""Of arrays of float64, whatever a kernel gives them, by the library's names for float64."""


def function(symbol: str, dtype: Any) -> Operation:
    """The function of a symbol of the library; those of float32 are called as those of float64, and end in f.

    Raises:
        Unbatched: It is none of ours.
    """
    name = symbol.removeprefix(PREFIX)
    name = name.removesuffix("f") if dtype == tl.float32 else name
    if name not in FUNCTIONS:
        raise Unbatched(f"libdevice's {symbol}")
    return FUNCTIONS[name]


def call(builder: Any, library: str, path: str, symbol: str, arguments: list[Handle], to: Any, is_pure: bool) -> Handle:
    """The builder's method that calls the library."""
    if symbol in (f"{PREFIX}fma", f"{PREFIX}fmaf"):
        return builder.create_fma(*arguments)
    wide = [each.data.astype(np.float64, copy=False) for each in arguments]
    data, shape = function(symbol, arguments[0].dtype.scalar)(*wide), common_shape(*arguments)
    if held_dtype(to).kind == "i":
        return Handle(to_integers(data, held_dtype(to)), to.scalar, shape)
    return rounded(data, to, shape)
