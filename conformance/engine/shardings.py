"""How tensors lie over ranks: which dimensions are split among them, and how; all else is whole on every rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch


@dataclass(frozen=True)
class Blocks:
    """A dimension that is several blocks of another one, and of which a rank has its part of each: gate rows, then up rows."""

    of: str
    """The other dimension, which is split evenly."""
    number: int = 2
    """How many blocks there are."""
    interleaved: bool = False
    """Whether they take turns (gate, up, gate, up), so that each rank's rows lie side by side."""

    def __str__(self) -> str:
        blocks = f"{self.number} blocks of {self.of}"
        return f"{blocks} that take turns, split evenly" if self.interleaved else f"each of {blocks} split evenly"


@dataclass(frozen=True)
class EvenMultiple:
    """A dimension that is split evenly, and must be a multiple of another size besides: experts, of their groups."""

    of: str
    """The other size."""

    def __str__(self) -> str:
        return f"even, and a multiple of {self.of}"


Share: TypeAlias = Literal["even", "uneven"] | EvenMultiple | Blocks
"""Contiguous chunks as by `torch.tensor_split`, of one size (`"even"`) or of any, also 0; or as `Blocks` says."""
Sharding: TypeAlias = Mapping[str, Share]
"""By dimension."""


def fit(sharding: Sharding, sizes: Mapping[str, Any], ranks: int) -> dict[str, Any]:
    """Sizes of which those are rounded up that must divide evenly among the ranks."""
    fitting = dict(sizes)
    for name in sizes.keys() & sharding.keys():
        share = sharding[name]
        if share == "even" or isinstance(share, EvenMultiple):
            step = math.lcm(ranks, sizes[share.of]) if isinstance(share, EvenMultiple) else ranks
            fitting[name] = -(-sizes[name] // step) * step
    blocks = {name: share for name, share in sharding.items() if isinstance(share, Blocks) and name in sizes}
    return fitting | {name: share.number * fitting[share.of] for name, share in blocks.items()}


def split_along(sharding: Sharding, shape: Sequence[object]) -> int | None:
    """The place of the dimension, one at most, along which a tensor of that shape is split."""
    return next((place for place, name in enumerate(shape) if name in sharding), None)


def part(tensor: torch.Tensor, shape: Sequence[object], sharding: Sharding, rank: int, ranks: int) -> torch.Tensor:
    """A rank's part: a view where it lies side by side, else a copy."""
    place = split_along(sharding, shape)
    if place is None or place >= tensor.ndim:  # a bad call may lack dimensions
        return tensor
    share = sharding[str(shape[place])]
    if not isinstance(share, Blocks) or share.interleaved:
        return tensor.tensor_split(ranks, place)[rank]
    return torch.cat([block.tensor_split(ranks, place)[rank] for block in tensor.tensor_split(share.number, place)], place)


def whole(parts: Sequence[torch.Tensor], shape: Sequence[object], sharding: Sharding) -> torch.Tensor:
    """All ranks' parts of a tensor that is split put together.

    Raises:
        ValueError: If they do not fit together.
    """
    place = split_along(sharding, shape)
    assert place is not None
    share = sharding[str(shape[place])]
    try:
        if not isinstance(share, Blocks) or share.interleaved:
            return torch.cat([*parts], place)
        in_blocks = [each.tensor_split(share.number, place) for each in parts]
        return torch.cat([block for of_ranks in zip(*in_blocks, strict=True) for block in of_ranks], place)
    except (RuntimeError, IndexError):
        shapes = ", ".join(str(tuple(each.shape)) for each in parts)
        raise ValueError(f"the ranks' shards do not fit together: {shapes}") from None


def alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same bits, but for those of NaN."""
    if left.shape != right.shape or left.dtype != right.dtype or not torch.equal(left.isnan(), right.isnan()):
        return False
    bits = [each.masked_fill(each.isnan(), 0).contiguous().flatten().view(torch.uint8) for each in (left, right)]
    return torch.equal(*bits)
