"""Matrix products of routed rows: each with the matrix of its expert, and those of an expert with each other.

Rows are gathered and scattered whole and never permuted in memory. Operands are read in their own dtype,
once for each tile of the result that needs them; one program adds up all products of its tile in float32,
in one order, and writes it once. Many rows per expert are bound by the matrix units, few by reading the
matrices.

Everything is addressed by strides, in 64 bits: an expert times its stride may pass 2^31.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.dispatch import Blocks
from gaugeblock.optimized.triton.launch import on_amd


class Tiles(NamedTuple):
    """What one program does: `rows` by `columns` of the result, `depth` products of each at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments of a launch."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_DEPTH": self.depth,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def choose_tiles(*operands: torch.Tensor, accumulators: int = 1) -> Tiles:
    """Choose the tiles of a product.

    Dtype, strides and the sizes of rows and matrices decide, never the number of tokens or experts: a token's
    bits must not depend on its batch. Each line of the table compiles for sm_80, sm_90, sm_100 and gfx942
    without a spilled register; accumulators share the columns of a program, so that several need no more
    registers than one.

    Args:
        operands: All tensors of a pass, so that its kernels agree on the rows of a block.
        accumulators: Results that a program keeps of each column.
    """
    if operands[0].dtype == torch.float32:
        # no matrix unit of NVIDIA multiplies float32 exactly: operands pass through registers, so small tiles
        tiles = Tiles(32, 64, 16, num_warps=8, num_stages=3)
    elif not all(_is_aligned(operand) for operand in operands):
        # each element has an address of its own, in two registers; 64 rows are the fewest that wgmma takes
        tiles = Tiles(64, 64, 32, num_warps=8, num_stages=2)
    elif on_amd():
        # gfx942 has 64 KiB of shared memory, and 256 registers for each lane of 8 warps
        tiles = Tiles(64, 128, 64, num_warps=8, num_stages=2)
    else:
        # 64 rows of wgmma for each of two warp groups; two forward programs fit on a multiprocessor of sm_90
        tiles = Tiles(128, 128, 64, num_warps=8, num_stages=3)
    return tiles._replace(columns=tiles.columns // triton.next_power_of_2(accumulators))


def _is_aligned(operand: torch.Tensor) -> bool:
    """Whether Triton reads neighbours together: of a number it knows only if it is 1 or a multiple of 16."""
    return (
        operand.data_ptr() % 16 == 0
        and all(size % 16 == 0 for size in operand.shape[1:])
        and all(stride == 1 or stride % 16 == 0 for stride in operand.stride())
    )


@triton.jit
def _rows_times_matrices_kernel(
    left_ptr, matrices_ptr, out_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    width, depth, expert_stride, column_stride, depth_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    start = tl.load(starts_ptr + block)
    end = tl.load(ends_ptr + block)
    if start == end:
        return
    positions = start + tl.arange(0, BLOCK_ROWS)[:, None]
    row_exists = positions < end
    positions = tl.minimum(positions, end - 1)  # past the end, the last row again, not to be stored
    columns = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    column_exists = columns < width

    left_ptrs = left_ptr + positions * depth
    matrix_ptrs = matrices_ptr + tl.load(experts_ptr + block) * expert_stride + columns * column_stride
    total = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, depth, BLOCK_DEPTH):
        steps = first + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        exists = steps < depth
        left = tl.load(left_ptrs + steps[None, :], mask=exists[None, :], other=0.0)
        matrix_offsets = (steps * depth_stride)[:, None]
        matrix = tl.load(matrix_ptrs + matrix_offsets, mask=exists[:, None] & column_exists, other=0.0)
        total = tl.dot(left, matrix, total, input_precision="ieee")

    rows = tl.load(rows_ptr + positions)
    tl.store(out_ptr + rows * width + columns, total, mask=row_exists & column_exists)


def rows_times_matrices(
    left: torch.Tensor, matrices: torch.Tensor, rows: torch.Tensor, blocks: Blocks, tiles: Tiles
) -> torch.Tensor:
    """Multiply each row by the matrix of its expert.

        out[rows[p]] = matrices[e] @ left[p],  e = expert of position p

    Args:
        left: [num_rows, depth], contiguous, sorted by expert.
        matrices: [num_experts, width, depth], any strides; dtype of left.
        rows: [num_rows] int64, the routed row at each position.
        blocks: Of tiles.rows positions.
        tiles: From `choose_tiles`.

    Returns:
        [num_rows, width] float32.
    """
    num_rows, depth = left.shape
    width = matrices.shape[1]
    out = torch.empty(num_rows, width, dtype=torch.float32, device=left.device)
    grid = (blocks.experts.shape[0], triton.cdiv(width, tiles.columns))
    _rows_times_matrices_kernel[grid](
        left, matrices, out, rows, *blocks,
        width, depth, *matrices.stride(), **tiles.options,
    )  # fmt: skip
    return out


@triton.jit
def _sum_of_products_kernel(
    left_ptr, right_ptr, out_ptr, rows_ptr, expert_offsets_ptr,
    left_width, right_width, top_k, right_row_stride, right_column_stride,
    out_expert_stride, out_left_stride, out_right_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2).to(tl.int64)
    start = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    lefts = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    rights = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    left_exists = lefts < left_width
    right_exists = rights < right_width

    left_ptrs = left_ptr + lefts
    right_ptrs = right_ptr + rights * right_column_stride
    total = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(start, end, BLOCK_DEPTH):
        positions = first + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        exists = positions < end
        tokens = tl.load(rows_ptr + positions, mask=exists, other=0) // top_k
        left_offsets = (positions * left_width)[None, :]
        right_offsets = (tokens * right_row_stride)[:, None]
        left = tl.load(left_ptrs + left_offsets, mask=left_exists & exists[None, :], other=0.0)
        right = tl.load(right_ptrs + right_offsets, mask=exists[:, None] & right_exists, other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")

    out_ptrs = out_ptr + expert * out_expert_stride + lefts * out_left_stride + rights * out_right_stride
    tl.store(out_ptrs, total, mask=left_exists & right_exists)


def sum_of_products(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    top_k: int,
    tiles: Tiles,
) -> None:
    """Add up the outer products of each expert's rows, in their order; an expert without rows gets zeros.

        out[e, l, r] = sum over positions p of e of left[p, l] * right[t, r],  t = token of rows[p]

    Args:
        left: [num_rows, left_width], contiguous, sorted by expert.
        right: [num_tokens, right_width], any strides; dtype of left.
        out: [num_experts, left_width, right_width], any strides; every element is written.
        rows: [num_rows] int64, the routed row at each position.
        expert_offsets: [num_experts + 1] int64, as from `sort_by_expert`.
        top_k: Routed rows per token.
        tiles: From `choose_tiles`.
    """
    num_experts, left_width, right_width = out.shape
    grid = (triton.cdiv(left_width, tiles.rows), triton.cdiv(right_width, tiles.columns), num_experts)
    _sum_of_products_kernel[grid](
        left, right, out, rows, expert_offsets,
        left_width, right_width, top_k, *right.stride(), *out.stride(), **tiles.options,
    )  # fmt: skip
