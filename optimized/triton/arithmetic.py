"""Arithmetic that Triton has only approximately."""

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    """Return x / y, correctly rounded; `/` of float32 is an approximation on GPUs."""
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, tl.broadcast_to(y, x.shape))
    return quotient
