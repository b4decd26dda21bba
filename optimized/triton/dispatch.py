"""Dispatch: routed rows sorted by expert, cut into blocks of one expert each, and summed up for their tokens.

Shapes: T num_tokens, K top_k, N = T * K routed rows, E num_experts, B blocks.

Routed row n is choice n % K of token n // K; its *position* is its place when rows are sorted by expert.
Nothing here waits for the GPU: what depends on the routing stays on the device, and grids are as large as
the worst routing needs. The sum reads each routed row once and writes each token once: it is bound by
memory.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.launch import program_rows


class Blocks(NamedTuple):
    """Runs of positions, each of one expert: block b is `starts[b]` to `ends[b]`, exclusive; it may be empty.

    Attributes:
        experts: [num_blocks] int64; of an empty block, any expert.
        starts: [num_blocks] int64.
        ends: [num_blocks] int64.
    """

    experts: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor


def sort_by_expert(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort routed rows by expert; rows of one expert stay in the order of their tokens.

    Args:
        topk_ids: [num_tokens, top_k], integer, each in 0..num_experts - 1.
        num_experts: Number of experts.

    Returns:
        rows: [num_tokens * top_k] int64, the routed row at each position.
        expert_offsets: [num_experts + 1] int64; expert e has the positions from offset e to offset e + 1.
    """
    ids_N, rows_N = torch.sort(topk_ids.reshape(-1).to(torch.int64), stable=True)
    # a search, since a bincount waits for the GPU
    offsets = torch.searchsorted(ids_N, torch.arange(num_experts + 1, device=ids_N.device))
    return rows_N, offsets


def split_into_blocks(expert_offsets: torch.Tensor, num_rows: int, block_rows: int) -> Blocks:
    """Cut the positions of each expert into blocks of `block_rows`; the last of an expert may be shorter.

    There are as many blocks as the worst routing of `num_rows` needs, so that their number is known without
    the routing: every expert with rows has one block that may be short, and all others are full. Blocks that
    this routing does not need are empty and come last.

    Args:
        expert_offsets: [num_experts + 1] int64, as from `sort_by_expert`.
        num_rows: Number of routed rows.
        block_rows: Rows in a full block.
    """
    num_experts = expert_offsets.shape[0] - 1
    num_short = min(num_rows, num_experts)
    blocks_B = torch.arange(num_short + (num_rows - num_short) // block_rows, device=expert_offsets.device)

    num_blocks_E = expert_offsets.diff().add(block_rows - 1) // block_rows
    last_E = num_blocks_E.cumsum(0)
    # needless blocks count on from the last expert's, so they start behind its end
    experts_B = torch.searchsorted(last_E, blocks_B, right=True).clamp(max=num_experts - 1)
    starts_B = expert_offsets[experts_B] + (blocks_B - (last_E - num_blocks_E)[experts_B]) * block_rows
    expert_ends_B = expert_offsets[experts_B + 1]
    return Blocks(experts_B, starts_B.minimum(expert_ends_B), (starts_B + block_rows).minimum(expert_ends_B))


@triton.jit
def _sum_rows_kernel(
    rows_ptr, weights_ptr, sums_ptr,
    num_tokens, top_k, width, weights_token_stride, weights_choice_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tokens = program_rows(BLOCK_TOKENS)[:, None]
    columns = (tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS))[None, :]
    exists = tokens < num_tokens
    mask = exists & (columns < width)

    row_ptrs = rows_ptr + tokens * top_k * width + columns
    weight_ptrs = weights_ptr + tokens * weights_token_stride if weights_ptr is not None else None
    total = tl.full([BLOCK_TOKENS, BLOCK_COLUMNS], 0.0, tl.float32)
    for _ in range(top_k):
        row = tl.load(row_ptrs, mask=mask, other=0.0)
        if weights_ptr is not None:
            row *= tl.load(weight_ptrs, mask=exists, other=0.0).to(tl.float32)
            weight_ptrs += weights_choice_stride
        total += row
        row_ptrs += width
    tl.store(sums_ptr + tokens * width + columns, total, mask=mask)


def sum_rows(rows: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Add up the rows of each token in the order of its choices, in float32, and round once.

        sums[t] = sum over j of weights[t, j] * rows[t, j]

    Args:
        rows: [num_tokens, top_k, width] float32, contiguous.
        weights: [num_tokens, top_k], floating, any strides; None for ones.
        dtype: Of the sums.

    Returns:
        [num_tokens, width].
    """
    num_tokens, top_k, width = rows.shape
    sums = torch.empty(num_tokens, width, dtype=dtype, device=rows.device)
    block_tokens, block_columns = 4, 128
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(width, block_columns))
    _sum_rows_kernel[grid](
        rows, weights, sums,
        num_tokens, top_k, width, *(weights.stride() if weights is not None else (0, 0)),
        BLOCK_TOKENS=block_tokens, BLOCK_COLUMNS=block_columns,
    )  # fmt: skip
    return sums
