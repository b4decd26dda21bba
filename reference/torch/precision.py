"""The precision that references compute in."""

import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or in float64 where it has that dtype already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
