"""Public modules that cast to float32 whatever they are given, made to compute in float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def float32_is_float64() -> Iterator[None]:
    """Makes modules that cast to float32 whatever they are given compute in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
