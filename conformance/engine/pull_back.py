"""Gradients through given cotangents.

`torch.autograd.grad(outputs, inputs, cotangents)` does the same, and imports sympy to compare their shapes: half a second in
each process, two where nothing is in memory. Of a number it asks for no cotangent, and imports nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch


class _Number(torch.autograd.Function):
    """A number of which the gradient with respect to each output is its cotangent."""

    @staticmethod
    def forward(ctx: Any, cotangents: Sequence[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.cotangents = cotangents
        return torch.zeros((), device=outputs[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *ctx.cotangents


def pull_back(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    *,
    materialize: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The gradients of `inputs`; of one that no output depends on None, or zeros.

    Args:
        cotangents: Of each output, of its shape and dtype; it is handed on as it lies in memory.
        materialize: Whether a gradient that does not exist is zeros.
    """
    number: torch.Tensor = _Number.apply(cotangents, *outputs)
    return torch.autograd.grad(number, inputs, allow_unused=True, materialize_grads=materialize)
