"""Rows between ranks, forward and backward: moved, gathered, and added up in the order of the ranks.

A sum over ranks is one exchange, in which each rank gets all ranks' parts of its share of the rows, and adds them up in the order
of the ranks; where all need all of it, a second one gathers the shares. That moves what a ring would. But a ring, as gloo and
NCCL have it, begins each share's sum at another rank, so that a row's bits would depend on its place in the batch. Of few bytes
every rank gathers all parts, and adds them up itself: one exchange, the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from gaugeblock.reference.torch.precision import at_least_float32

MOST_GATHERED_BYTES = 1 << 18
"""Of all ranks' parts: as far as one exchange was found to take half as long as two (gloo, 2 and 4 ranks of one machine)."""


def exchange(rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Send rows, sorted by rank, `sent[r]` of them to rank r; return those of all ranks, `received[r]` from rank r."""
    return begin_exchange(rows, sent, received, group)()


def begin_exchange(
    rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Callable[[], torch.Tensor]:
    """Begin an `exchange`; what is returned waits for its end, and then returns the rows."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    # what leaves is held by the work until its end
    work = dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=group, async_op=True)

    def wait() -> torch.Tensor:
        if work is not None:  # none on one rank of some backends
            work.wait()
        return arrived

    return wait


def gather_rows(rows: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Return the rows of all ranks, in the order of the ranks; `sizes[r]` of rank r, padded on the way to the most of any."""
    most = max(sizes)
    if most == 0:
        return rows
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: len(rows)] = rows
    of_ranks = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(of_ranks, padded, group=group)
    return torch.cat([each[:size] for each, size in zip(of_ranks, sizes, strict=True)])


def sum_rows(rows: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Add up all ranks' rows, sorted by the rank that wants them, `sizes[r]` by rank r; return this rank's."""
    mine = sizes[dist.get_rank(group)]
    parts = exchange(rows, sizes, [mine] * len(sizes), group).unflatten(0, (len(sizes), mine)).unbind()
    return _sum_in_order(parts)


def sum_over_ranks(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Add up what all ranks have, as many rows on each; return all of it, the same bits on every rank."""
    ranks = dist.get_world_size(group)
    if ranks == 1 or not len(rows):
        return rows
    if ranks * rows.numel() * rows.element_size() <= MOST_GATHERED_BYTES:
        return _sum_in_order(gather_rows(rows, [len(rows)] * ranks, group).unflatten(0, (ranks, len(rows))).unbind())
    share = -(-len(rows) // ranks)
    padded = torch.cat([rows, rows.new_zeros(share * ranks - len(rows), *rows.shape[1:])])
    return gather_rows(sum_rows(padded, [share] * ranks, group), [share] * ranks, group)[: len(rows)]


def _sum_in_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:  # not torch.sum, which adds up in an order of its own
        total = total + part
    return total


class SumOverRanks(torch.autograd.Function):
    """Rows that every rank has a part of, added up; each rank then has all of it, and the gradient of all of it."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return sum_over_ranks(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return d_rows, None


class SumOfRows(torch.autograd.Function):
    """Parts of all ranks' rows, added up in float32 at least; each rank gets its own rows, rounded once."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, dtype: torch.dtype, sizes: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sizes, ctx.group, ctx.dtype = sizes, group, rows.dtype
        return sum_rows(rows, sizes, group).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gather_rows(d_rows, ctx.sizes, ctx.group).to(ctx.dtype), None, None, None


def replicated(group: dist.ProcessGroup, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Take what every rank has alike, of any shapes, as float32 at least; gradients are added up over the ranks.

    They arrive in float32 and are rounded once they are added up; all of them travel in one exchange.
    """
    tracked = [each for each in tensors if each.requires_grad]
    wanted = iter(_Replicated.apply(group, *tracked) if tracked else ())
    return [next(wanted) if each.requires_grad else at_least_float32(each) for each in tensors]


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.dtypes = group, [each.dtype for each in tensors]
        return tuple(at_least_float32(each) for each in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total = sum_over_ranks(torch.cat([each.flatten() for each in gradients]), ctx.group)
        parts = total.split([each.numel() for each in gradients])
        rounded = [part.view(each.shape).to(dtype) for part, each, dtype in zip(parts, gradients, ctx.dtypes, strict=True)]
        return None, *rounded


def gathered(sizes: Sequence[int], group: dist.ProcessGroup, *rows: torch.Tensor) -> list[torch.Tensor]:
    """Gather what each rank has a part of, in its dtype, and take it as float32 at least.

    Gradients are added up over the ranks, each rank getting those of its own rows, in one exchange.
    """
    tracked = [each for each in rows if each.requires_grad]
    wanted = iter(_Gathered.apply(sizes, group, *tracked) if tracked else ())
    return [next(wanted) if each.requires_grad else at_least_float32(gather_rows(each, sizes, group)) for each in rows]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sizes: Sequence[int], group: dist.ProcessGroup, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.sizes, ctx.group, ctx.dtypes = sizes, group, [each.dtype for each in rows]
        return tuple(at_least_float32(gather_rows(each, sizes, group)) for each in rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *_together(d_rows, ctx.dtypes, lambda rows: sum_rows(rows, ctx.sizes, ctx.group))


def _together(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype], summed: Any) -> list[torch.Tensor]:
    """Add up tensors of two dimensions and as many rows side by side, then round each."""
    total = summed(torch.cat([*tensors], dim=1))
    parts = total.split([each.shape[1] for each in tensors], dim=1)
    return [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]


class SumOfGradients(torch.autograd.Function):
    """What every rank has alike, and computes other parts of the result from: gradients are added up over the ranks.

    They are added up in float32 at least and rounded once; all of them travel in one exchange. Megatron's `f`; `SumOverRanks` is
    its `g`.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(each.view_as(each) for each in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total = sum_over_ranks(torch.cat([at_least_float32(each).flatten() for each in gradients]), ctx.group)
        parts = total.split([each.numel() for each in gradients])
        return None, *(part.view(each.shape).to(each.dtype) for part, each in zip(parts, gradients, strict=True))


class AllToAll(torch.autograd.Function):
    """Deal an axis to the ranks, and gather another one, of which each had a part: `[..., A, ..., S / R, ...]` becomes
    `[..., A / R, ..., S, ...]`. Its gradient travels back the same way."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dealt: int, gathered: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.dealt, ctx.gathered, ctx.group = dealt, gathered, group
        return all_to_all(tensor, dealt, gathered, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_tensor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return all_to_all(d_tensor, ctx.gathered, ctx.dealt, ctx.group), None, None, None


def all_to_all(tensor: torch.Tensor, dealt: int, gathered: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Do what `AllToAll` does, without a gradient; the size of the axis that is dealt is a multiple of the ranks."""
    ranks = dist.get_world_size(group)
    sent = torch.stack(tensor.chunk(ranks, dealt))  # contiguous
    arrived = torch.empty_like(sent)
    dist.all_to_all_single(arrived, sent, group=group)
    return torch.cat(arrived.unbind(), gathered)


class GatherParts(torch.autograd.Function):
    """Gather an axis, of which each rank has as large a part; each rank then has all of it, and the gradient of all of it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, axis: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.axis, ctx.rank, ctx.ranks = axis, dist.get_rank(group), dist.get_world_size(group)
        of_ranks = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ctx.ranks)]
        dist.all_gather(of_ranks, tensor.contiguous(), group=group)
        return torch.cat(of_ranks, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_tensor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return d_tensor.chunk(ctx.ranks, ctx.axis)[ctx.rank], None, None
