"""Which of torch's operations round, and how: moves, products, sums, what is made in steps; how far functions may be off."""

from collections.abc import Callable
from typing import Any

import torch

MOST_ULPS = 2.0**24  # of a result that is not exactly 0 or infinite

# Units in the last place of float32 that a library's function may be off; exact operations count 1.
ULPS = {"exp": 2, "exp2": 2, "log": 2, "sigmoid": 4, "silu": 4, "tanh": 4, "erf": 4, "gelu": 8, "rsqrt": 2, "_softmax": 4,
        "_log_softmax": 4, "pow": 2, "sin": 2, "cos": 2, "silu_backward": 6, "gelu_backward": 8, "log1p": 2, "softplus": 4,
        "softplus_backward": 6}  # fmt: skip

# Operations that move, choose or create values and so round nothing.
MOVES = frozenset(
    """abs alias amax amin arange as_strided atan2 cat clamp clamp_max clamp_min clone constant_pad_nd copy copy_ detach diagonal
    embedding empty empty_like empty_strided expand fill fill_ flip full full_like gather index index_put index_select lift_fresh
    masked_fill masked_fill_ masked_scatter max maximum min minimum neg new_empty new_empty_strided new_full new_ones new_zeros
    ones ones_like permute relu repeat reshape roll scalar_tensor scatter select_backward select_scatter sign slice_backward
    slice_scatter sort split stack t threshold_backward topk tril triu unbind unfold unsqueeze view where zero zero_ zeros
    zeros_like _to_copy _unsafe_view value_selecting_reduction_backward""".split()
)
MATRIX_PRODUCTS = {"mm": 0, "bmm": 0, "mv": 0, "dot": 0, "addmm": 1, "addmv": 1, "baddbmm": 1, "_grouped_mm": 0}
CONVOLUTIONS = {"convolution": 2, "convolution_backward": 3}  # and how many of the first arguments are multiplied with each other
ADDITIONS = {"add", "add_", "sub", "sub_"}
SUMS = {"sum", "mean", "cumsum"}
COMPOSED: dict[str, Callable[..., Any]] = {  # of steps, each of which may be rounded: where they cancel, it shows
    "lerp": lambda start, end, weight: start + weight * (end - start),
    "addcmul": lambda start, left, right, value=1: start + value * (left * right),
    "addcdiv": lambda start, left, right, value=1: start + value * (left / right),
}
SCATTERED_SUMS = {"index_add": 3, "index_add_": 3, "scatter_add": 3, "scatter_add_": 3, "index_put": 2, "index_put_": 2}


def argument_growth(name: str, result: torch.Tensor, args: tuple, in_front: int) -> torch.Tensor | float:
    """Relative error, in ulps, that a rounded argument (x · log2 e, or z - max) causes in an exponential.

    Args:
        in_front: How many dimensions stand before the operation's own.
    """
    match name:
        case "exp":
            return args[0].abs()
        case "sigmoid" | "silu":
            return args[0].abs() * args[0].neg().sigmoid()
        case "gelu":  # 1 + tanh, or 1 + erf, is rounded near 1 also where it is near 0
            return (args[0].abs() / (2 * result.abs()).clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(2**24)
        case "softplus":
            return args[0].abs() * (args[0].sigmoid() / result).nan_to_num(1.0)  # of 0, far below 0, that of the exponential
        case "silu_backward" | "softplus_backward":
            return args[1].abs() * args[1].neg().sigmoid()
        case "_softmax":
            along = args[1] if args[1] < 0 else args[1] + in_front
            return (args[0] - args[0].amax(along, keepdim=True)).abs().nan_to_num(0.0)
        case _:
            return 0.0
