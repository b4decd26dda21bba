"""The UNets with the backward pass of flash attention: equal in exact arithmetic, with other rounding; see `flash_attention`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gaugeblock.conformance.contracts.flash_attention import FlashAttention
from gaugeblock.reference.torch import unet as model


def unet(*arguments: Any, **options: Any) -> torch.Tensor:
    """`unet.unet` with that attention."""
    with _flash_attention():
        return model.unet(*arguments, **options)


def unet_text_time(*arguments: Any, **options: Any) -> torch.Tensor:
    """`unet.unet_text_time` with that attention."""
    with _flash_attention():
        return model.unet_text_time(*arguments, **options)


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Lets the reference look at pixels and words by it; the backward pass of each call is bound in its forward pass."""
    before = model.attention
    model.attention = attention
    try:
        yield
    finally:
        model.attention = before


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """As `reference.torch.attention.attention`."""
    return FlashAttention.apply(query, key, value, mask)
