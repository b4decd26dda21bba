"""How tensors lie over ranks: which dimensions are split among them, and how; all else is whole on every rank."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias


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
