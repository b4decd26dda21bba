"""What a rank sends to others: collectives are counted where torch offers them."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any
from unittest.mock import patch

import torch.distributed as dist


@dataclass
class Traffic:
    """Of one rank."""

    collectives: int = 0
    sent_bytes: int = 0
    """Of what the rank has, to others; of a sum, what a ring sends."""


def _exchanged(given: dict[str, Any], ranks: int, rank: int) -> float:
    rows, splits = given["input"], given.get("input_split_sizes")
    own = splits[rank] / max(1, len(rows)) if splits else 1 / ranks
    return rows.nbytes * (1 - own)


Sent = Callable[[dict[str, Any], int, int], float]
COLLECTIVES: dict[str, Sent] = {
    "all_to_all_single": _exchanged,
    "all_gather": lambda given, ranks, rank: given["tensor"].nbytes * (ranks - 1),
    "all_gather_into_tensor": lambda given, ranks, rank: given["input_tensor"].nbytes * (ranks - 1),
    "all_gather_single": lambda given, ranks, rank: given["input_tensor"].nbytes * (ranks - 1),
    "reduce_scatter_tensor": lambda given, ranks, rank: given["input"].nbytes * (ranks - 1) / ranks,
    "reduce_scatter_single": lambda given, ranks, rank: given["input"].nbytes * (ranks - 1) / ranks,
    "all_reduce": lambda given, ranks, rank: 2 * given["tensor"].nbytes * (ranks - 1) / ranks,
}
"""Bytes that a rank sends, from the arguments of a call."""


@contextmanager
def counted_traffic() -> Iterator[Traffic]:
    """Counts this process' collectives of those kinds, however deep inside they are called, if by `torch.distributed`'s name."""
    traffic = Traffic()

    def counting(name: str, sent: Sent) -> Callable[..., Any]:
        function = getattr(dist, name)
        parameters = signature(function)

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            given = parameters.bind(*arguments, **options).arguments
            group = given.get("group")
            traffic.collectives += 1
            traffic.sent_bytes += round(sent(given, dist.get_world_size(group), dist.get_rank(group)))
            return function(*arguments, **options)

        return call

    with ExitStack() as patches:
        for name, sent in COLLECTIVES.items():
            if hasattr(dist, name):  # a later torch has other names for some
                patches.enter_context(patch.object(dist, name, counting(name, sent)))
        yield traffic
