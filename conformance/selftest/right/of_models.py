"""What right variants of several models have in common."""

import torch


def rounded(operand: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is multiplied, in float32, its value rounded to a dtype as tensor cores want it, its gradient whole."""
    return operand + (operand.to(dtype).float() - operand).detach()
