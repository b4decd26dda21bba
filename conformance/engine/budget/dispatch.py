"""The base of what watches or changes a run of torch, operation by operation."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """A dispatch mode that is left alone by torch's compiler: torch imports it otherwise, 1.5 s, to have nothing compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among arguments or results, also in lists; `tree_leaves` of torch takes longer than most operations."""
    for each in values:
        if isinstance(each, torch.Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from tensors_in(each)
