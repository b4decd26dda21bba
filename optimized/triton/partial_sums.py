"""Sums in two steps, without atomics: programs write sums of chunks in float32, and a second kernel adds these up in their order.

So every run gives the same bits. It reads the chunks once, and is small beside what wrote them.
"""

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.launch import program_columns

SUM_BLOCK = (32, 64)  # chunks and columns that a program takes at once, for 4 warps


@triton.jit
def _sum_chunks_kernel(chunks_ptr, sums_ptr, num_chunks, width, BLOCK_CHUNKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Add up chunks [..., C, D] to sums [..., D]."""
    row = tl.program_id(0).to(tl.int64)
    columns = program_columns(BLOCK_COLUMNS)
    exists = columns < width
    total = tl.full([BLOCK_CHUNKS, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, num_chunks, BLOCK_CHUNKS):
        chunks = first + tl.arange(0, BLOCK_CHUNKS)[:, None]
        mask = (chunks < num_chunks) & exists
        total += tl.load(chunks_ptr + (row * num_chunks + chunks) * width + columns, mask=mask, other=0.0)
    tl.store(sums_ptr + row * width + columns, tl.sum(total, axis=0)[None, :], mask=exists)


def sum_chunks(chunks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Add up contiguous float32 chunks [..., num_chunks, width] to [..., width], rounded once to a dtype."""
    *rows, num_chunks, width = chunks.shape
    sums = chunks.new_empty(*rows, width, dtype=dtype)
    block_chunks, block_columns = SUM_BLOCK
    _sum_chunks_kernel[(sums.shape[:-1].numel(), triton.cdiv(width, block_columns))](
        chunks, sums, num_chunks, width, BLOCK_CHUNKS=block_chunks, BLOCK_COLUMNS=block_columns
    )
    return sums
