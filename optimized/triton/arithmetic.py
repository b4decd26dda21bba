"""Arithmetic that Triton has only approximately, or not: quotients, softmaxes of rows and their derivatives."""

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


@triton.jit
def exponentials_of(logits):
    """Return exp(logits - highest), their sum, and the highest of each row."""
    highest = tl.max(logits, axis=1)[:, None]
    exponentials = tl.exp(logits - highest)
    return exponentials, tl.sum(exponentials, axis=1)[:, None], highest


@triton.jit
def softmax_of(logits):
    """Return the softmax of each row."""
    exponentials, total, _ = exponentials_of(logits)
    return divide(exponentials, total)


@triton.jit
def through_softmax(probabilities, slopes):
    """Return the gradient of logits: dx = p * (dp - sum(p * dp)), dp being the slopes."""
    # centered twice: where a probability is near 1, what rounding leaves of the mean is as large as the gradient
    for _ in tl.static_range(2):
        slopes -= tl.sum(probabilities * slopes, axis=1)[:, None]
    return probabilities * slopes
