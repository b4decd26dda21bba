"""The precision that references compute in."""

import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or in float64 where it has that dtype already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return `x` rounded to float8_e4m3fn, ties to even, or as it is in float64: there nothing is rounded."""
    return x if x.dtype == torch.float64 else x.to(torch.float8_e4m3fn)


def through_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Return `x` rounded to float8_e4m3fn, in its own dtype, float64 too: where that rounding is what an operation does."""
    return x.to(torch.float8_e4m3fn).to(x.dtype)
