"""Models with the backward pass of flash attention: equal in exact arithmetic, with other rounding.

Where autograd subtracts the mean of dP under P, a flash kernel subtracts delta = rowsum(dO · O), which needs no scores. Where
O is rounded before it is kept, delta has the error of that rounding, and dS = P (dP - delta) no longer sums to 0: the gradient
of what moves all scores of a row alike (the keys' bias, exactly 0) gets an error that grows with the size of v. Nowhere is its
error less than autograd's (`tests/test_flash_attention.py`), so that a budget found by it allows for both.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch


def of(model: Callable[..., Any], module: ModuleType) -> Callable[..., Any]:
    """A model whose attention is that; `module` is where the model takes `attention` from."""

    def formula(*arguments: Any, **options: Any) -> Any:
        with mock.patch.object(module, "attention", attend):
            return model(*arguments, **options)

    return formula


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """As `reference.torch.attention.attention`."""
    return FlashAttention.apply(query, key, value, mask)


class FlashAttention(torch.autograd.Function):
    """Attention whose backward pass takes delta from the result.

    Source: Dao et al. 2022 (arXiv:2205.14135), appendix B.2; delta as in equation 4.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if mask is None:
            probabilities = scores.softmax(-1)
        else:
            is_lost = ~mask.any(-1, keepdim=True)
            probabilities = torch.where(is_lost, 0.0, torch.where(mask | is_lost, scores, -math.inf).softmax(-1))
        attended = probabilities @ value
        ctx.save_for_backward(query, key, value, probabilities, attended)
        return attended

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, probabilities, attended = ctx.saved_tensors
        delta = (gradient * attended).sum(-1, keepdim=True)
        of_scores = probabilities * (gradient @ value.mT - delta) / math.sqrt(query.shape[-1])
        return of_scores @ key, of_scores.mT @ query, probabilities.mT @ gradient, None
