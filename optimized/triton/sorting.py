"""Routed rows sorted by expert, and padded to blocks, by counting: two kernels, and prefix sums of torch between them.

The rows are cut into chunks. `_count_kernel` counts the rows of each expert in each chunk; a prefix sum over experts,
and over the chunks of each, says where a chunk's rows of an expert begin; `_place_kernel` finds out how many rows of the
same expert come before a row in its chunk, and so its place. Rows of one expert stay in their order, every run gives
the same, nothing is added by atomics of ours, and nothing waits for the GPU.

Each pass reads every id once: bound by memory, and for few rows by launches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.launch import device_of, program_rows, require_triton_device
from gaugeblock.reference import validation
from gaugeblock.reference.torch.dispatch import most_blocks

# Rows of a chunk: each is compared with all the others.
CHUNK = 128


@triton.jit
def _load_ids(ids_ptr, rows, num_rows, top_k, token_stride, choice_stride, nobody):
    """Return the experts of these rows, int32; `nobody` where there is none."""
    exists = rows < num_rows
    ids_ptrs = ids_ptr + rows // top_k * token_stride + rows % top_k * choice_stride
    # not by `other`, which is cast to the dtype of the ids: 256 is 0 in eight bits
    return tl.where(exists, tl.load(ids_ptrs, mask=exists, other=0).to(tl.int32), nobody)


@triton.jit(do_not_specialize=["num_rows"])
def _count_kernel(
    ids_ptr, counts_ptr, num_rows, num_experts, top_k, token_stride, choice_stride, expert_stride,
    BINS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """counts[e, c] = rows of expert e in chunk c."""
    ids = _load_ids(ids_ptr, program_rows(BLOCK_ROWS), num_rows, top_k, token_stride, choice_stride, num_experts)
    experts = tl.arange(0, BINS)
    # the stride of a single chunk is 1, which Triton compiles as a constant: it cannot be cast
    counts_ptrs = counts_ptr + experts.to(tl.int64) * expert_stride + tl.program_id(0)
    tl.store(counts_ptrs, tl.histogram(ids, BINS), mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_rows"])
def _place_kernel(
    ids_ptr, starts_ptr, order_ptr, inverse_ptr, num_rows, num_experts, top_k, token_stride, choice_stride, expert_stride,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """inverse[n] = starts[e, c] + rows of e before n in chunk c; order[inverse[n]] = n."""
    rows = program_rows(BLOCK_ROWS)
    exists = rows < num_rows
    ids = _load_ids(ids_ptr, rows, num_rows, top_k, token_stride, choice_stride, num_experts)
    lanes = tl.arange(0, BLOCK_ROWS)
    same_before = (ids[:, None] == ids[None, :]) & (lanes[None, :] < lanes[:, None])
    rank = tl.sum(same_before.to(tl.int32), axis=1)
    places = tl.load(starts_ptr + ids.to(tl.int64) * expert_stride + tl.program_id(0), mask=exists, other=0) + rank
    tl.store(order_ptr + places, rows, mask=exists)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + rows, places, mask=exists)


class _Counts(NamedTuple):
    """Rows of each expert: `of_chunks[e, c]` of chunk c, `sizes[e]` of all; int64."""

    of_chunks: torch.Tensor
    sizes: torch.Tensor


def _count(topk_ids: torch.Tensor, num_experts: int) -> _Counts:
    num_rows = topk_ids.numel()
    chunks = triton.cdiv(num_rows, CHUNK)
    counts = topk_ids.new_empty(num_experts, chunks, dtype=torch.int64)
    if num_rows:
        _count_kernel[(chunks,)](
            topk_ids, counts, num_rows, num_experts, topk_ids.shape[1], *topk_ids.stride(), counts.stride(0),
            BINS=triton.next_power_of_2(num_experts + 1), BLOCK_ROWS=CHUNK,
        )  # fmt: skip
    return _Counts(counts, counts.sum(1))


def _place(
    topk_ids: torch.Tensor, counts: _Counts, first_places: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor | None
) -> None:
    """Write each row to its place, those of expert e from `first_places[e]` on."""
    num_rows = topk_ids.numel()
    starts = counts.of_chunks.cumsum(1) - counts.of_chunks + first_places[:, None]
    if num_rows:
        _place_kernel[(starts.shape[1],)](
            topk_ids, starts, order, inverse, num_rows, starts.shape[0], topk_ids.shape[1], *topk_ids.stride(),
            starts.stride(0), BLOCK_ROWS=CHUNK,
        )  # fmt: skip


def sort_by_expert(topk_ids: torch.Tensor, *, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed rows by expert: `reference.torch.dispatch.sort_by_expert`.

    Args:
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1, any strides. An id that comes twice has two rows.
        num_experts: Number of experts, of whom some may have no row.

    Returns:
        order: [num_tokens * top_k], int64, the routed row at each place.
        inverse: [num_tokens, top_k], int64, the place of each routed row.
        group_sizes: [num_experts], int64, the rows of each expert.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or `num_experts` is no integer.
        ValueError: Ranks or sizes are wrong, an id names no expert, there are none, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.dispatch.sort_by_expert`.
    """
    validation.sort_by_expert(topk_ids, num_experts)
    validation.expert_ids_in_range(topk_ids, num_experts=num_experts)
    require_triton_device("topk_ids", topk_ids)
    with device_of(topk_ids):
        counts = _count(topk_ids, num_experts)
        order = topk_ids.new_empty(topk_ids.numel(), dtype=torch.int64)
        inverse = topk_ids.new_empty(topk_ids.shape, dtype=torch.int64)
        _place(topk_ids, counts, counts.sizes.cumsum(0) - counts.sizes, order, inverse)
    return order, inverse, counts.sizes


def align_to_blocks(
    topk_ids: torch.Tensor, *, num_experts: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sort routed rows by expert, padded to whole blocks: `reference.torch.dispatch.align_to_blocks`.

    Args:
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1, any strides.
        num_experts: Number of experts.
        block_size: Rows of a block.

    Returns:
        sorted_token_ids: [num_blocks * block_size], int64, the routed row at each place; num_tokens * top_k for padding.
        expert_ids: [num_blocks], int64, the expert of each block; -1 for those that are not needed.
        num_tokens_post_padded: [], int64, the places of all blocks that are needed.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or an option is no integer.
        ValueError: Ranks or sizes are wrong, an id names no expert, there are no experts or no rows in a block, or Triton cannot
            run on the device.

    Source: `gaugeblock.reference.torch.dispatch.align_to_blocks`.
    """
    validation.align_to_blocks(topk_ids, num_experts, block_size)
    validation.expert_ids_in_range(topk_ids, num_experts=num_experts)
    require_triton_device("topk_ids", topk_ids)
    with device_of(topk_ids):
        counts = _count(topk_ids, num_experts)
        num_rows = topk_ids.numel()
        num_blocks = most_blocks(num_rows, num_experts, block_size)
        needed = (counts.sizes + block_size - 1) // block_size
        ends = needed.cumsum(0)
        blocks = torch.arange(num_blocks, device=topk_ids.device)
        expert_ids = torch.searchsorted(ends, blocks, right=True)
        expert_ids = torch.where(blocks < ends[-1], expert_ids, -1)
        order = torch.full((num_blocks * block_size,), num_rows, device=topk_ids.device)
        _place(topk_ids, counts, (ends - needed) * block_size, order, None)
    return order, expert_ids, ends[-1] * block_size
