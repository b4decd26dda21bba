"""Tensors cut for ranks, and put together again."""

from collections.abc import Sequence

import torch

from gaugeblock.conformance.engine.shardings import Blocks, Sharding, split_along


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
