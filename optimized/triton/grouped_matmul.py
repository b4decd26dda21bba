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
from triton.tools.tensor_descriptor import TensorDescriptor

from gaugeblock.optimized.triton.dispatch import Blocks, positions_of
from gaugeblock.optimized.triton.launch import on_amd
from gaugeblock.optimized.triton.persistent import choose_grid, descriptor_of, tile_of

# Of a GPU as kernels meet them today: an H100 has 132, an MI300X 304. It is a constant where bits depend on it, which are not
# to depend on the chip.
MULTIPROCESSORS = 128


class Tiles(NamedTuple):
    """What one program does: `rows` by `columns` of the result, `depth` products of each at a time."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    multiprocessors: int | None = None
    """Those of the chip, if a program may compute many tiles; else each computes one."""

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


def choose_tiles(
    *operands: torch.Tensor, accumulators: int = 1, rows_per_expert: int | None = None, multiprocessors: int | None = None
) -> Tiles:
    """Choose the tiles of a product.

    Dtype, strides and the sizes of rows and matrices decide, and the number of tokens or experts only where
    the caller hands in `rows_per_expert`: a token's bits must not depend on its batch. Each line of the table
    compiles for sm_80, sm_90, sm_100 and gfx942 without a spilled register; accumulators share the columns of
    a program, so that several need no more registers than one.

    Args:
        operands: All tensors of a pass, so that its kernels agree on the rows of a block.
        accumulators: Results that a program keeps of each column.
        rows_per_expert: How many there are on average. Few take tiles of twice as many rows, so that most experts have one
            block with little padding.
        multiprocessors: Those of the chip, if grids may depend on it. Few rows keep a program for each tile: matrices are read
            the faster the more programs read.
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
    if rows_per_expert is not None and rows_per_expert <= tiles.rows // 2:
        rows = min(max(triton.next_power_of_2(2 * rows_per_expert), 16), tiles.rows)
        tiles = tiles._replace(rows=rows, num_warps=4)
    else:
        tiles = tiles._replace(multiprocessors=multiprocessors)
    return tiles._replace(columns=tiles.columns // triton.next_power_of_2(accumulators))


def choose_splits(num_blocks: int, width: int, depth: int, tiles: Tiles) -> int:
    """Choose into how many parts to split the sums of a product, so that few rows still occupy every multiprocessor."""
    programs = num_blocks * triton.cdiv(width, tiles.columns)
    splits = 1
    while 2 * splits * programs <= MULTIPROCESSORS and 4 * splits * tiles.depth <= depth:
        splits *= 2
    return splits


def _is_aligned(operand: torch.Tensor) -> bool:
    """Whether Triton reads neighbours together: of a number it knows only if it is 1 or a multiple of 16."""
    return (
        operand.data_ptr() % 16 == 0
        and all(size % 16 == 0 for size in operand.shape[1:])
        and all(stride == 1 or stride % 16 == 0 for stride in operand.stride())
    )


@triton.jit
def _tile_of_rows_times_matrices(
    block, positions, row_exists, column_block, left_ptr, matrices_ptr, matrices_descriptor, biases_ptr, out_ptr, rows_ptr,
    experts_ptr, width, depth, split_depth, expert_stride, column_stride, depth_stride, bias_expert_stride, bias_column_stride,
    WIDTH_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    columns = column_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    column_exists = columns < width
    split = tl.program_id(2)

    expert = tl.load(experts_ptr + block)
    left_ptrs = left_ptr + positions * depth
    matrix_ptrs = matrices_ptr + expert * expert_stride + columns * column_stride
    total = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(split * split_depth, tl.minimum((split + 1) * split_depth, depth), BLOCK_DEPTH):
        steps = first + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        exists = steps < depth
        left = tl.load(left_ptrs + steps[None, :], mask=exists[None, :], other=0.0)
        if matrices_descriptor is None:
            matrix_offsets = (steps * depth_stride)[:, None]
            matrix = tl.load(matrix_ptrs + matrix_offsets, mask=exists[:, None] & column_exists, other=0.0)
        elif WIDTH_LAST:
            matrix = matrices_descriptor.load([expert.to(tl.int32), first, column_block * BLOCK_COLUMNS])
            matrix = matrix.reshape(BLOCK_DEPTH, BLOCK_COLUMNS)
        else:
            matrix = matrices_descriptor.load([expert.to(tl.int32), column_block * BLOCK_COLUMNS, first])
            matrix = matrix.reshape(BLOCK_COLUMNS, BLOCK_DEPTH).T
        total = tl.dot(left, matrix, total, input_precision="ieee")

    if biases_ptr is not None:
        bias_ptrs = biases_ptr + expert * bias_expert_stride + columns * bias_column_stride
        bias = tl.load(bias_ptrs, mask=column_exists, other=0.0).to(tl.float32)
        total += tl.where(split == 0, bias, 0.0)
    rows = tl.load(rows_ptr + positions) * tl.num_programs(2) + split
    tl.store(out_ptr + rows * width + columns, total, mask=row_exists & column_exists)


@triton.jit(do_not_specialize=["num_blocks"])
def _rows_times_matrices_kernel(
    left_ptr, matrices_ptr, matrices_descriptor, biases_ptr, out_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr, num_blocks,
    width, depth, split_depth, expert_stride, column_stride, depth_stride, bias_expert_stride, bias_column_stride,
    WIDTH_LAST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    if num_blocks is not None:
        num_column_blocks = tl.cdiv(width, BLOCK_COLUMNS)
        for index in range(tl.program_id(0), num_blocks * num_column_blocks, tl.num_programs(0)):
            block, column_block = tile_of(index, num_blocks, num_column_blocks)
            positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
            if not is_empty:
                _tile_of_rows_times_matrices(
                    block, positions, row_exists, column_block, left_ptr, matrices_ptr, matrices_descriptor, biases_ptr, out_ptr,
                    rows_ptr, experts_ptr, width, depth, split_depth, expert_stride, column_stride, depth_stride,
                    bias_expert_stride, bias_column_stride, WIDTH_LAST, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
                )  # fmt: skip
    else:
        block = tl.program_id(0)
        positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
        if is_empty:
            return
        _tile_of_rows_times_matrices(
            block, positions, row_exists, tl.program_id(1), left_ptr, matrices_ptr, matrices_descriptor, biases_ptr, out_ptr,
            rows_ptr, experts_ptr, width, depth, split_depth, expert_stride, column_stride, depth_stride,
            bias_expert_stride, bias_column_stride, WIDTH_LAST, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip


def rows_times_matrices(
    left: torch.Tensor,
    matrices: torch.Tensor,
    rows: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
    *,
    biases: torch.Tensor | None = None,
    splits: int = 1,
) -> torch.Tensor:
    """Multiply each row by the matrix of its expert, and add its bias.

        sum over s of out[rows[p], s] = matrices[e] @ left[p] + biases[e],  e = expert of position p

    Args:
        left: [num_rows, depth], contiguous, sorted by expert.
        matrices: [num_experts, width, depth], any strides; dtype of left.
        rows: [num_rows] int64, the routed row at each position.
        blocks: Of tiles.rows positions.
        tiles: From `choose_tiles`.
        biases: [num_experts, width], any strides; None for zeros.
        splits: Parts of the sum over depth, from `choose_splits`; the caller adds them up.

    Returns:
        [num_rows, splits, width] float32.
    """
    num_rows, depth = left.shape
    width = matrices.shape[1]
    out = torch.empty(num_rows, splits, width, dtype=torch.float32, device=left.device)
    split_depth = triton.cdiv(depth, splits * tiles.depth) * tiles.depth
    num_blocks = blocks.experts.shape[0]
    grid = choose_grid((num_blocks, triton.cdiv(width, tiles.columns), splits), tiles.multiprocessors, splits=splits)
    descriptor, width_last = _describe(matrices, tiles) if grid.persistent else (None, False)
    _rows_times_matrices_kernel[grid.shape](
        left, matrices, descriptor, biases, out, rows, *blocks, num_blocks if grid.persistent else None,
        width, depth, split_depth, *matrices.stride(), *((0, 0) if biases is None else biases.stride()),
        WIDTH_LAST=width_last, **tiles.options,
    )  # fmt: skip
    return out


def _describe(matrices: torch.Tensor, tiles: Tiles) -> tuple[TensorDescriptor | None, bool]:
    """Return a descriptor of matrices [num_experts, width, depth], and whether it is one of their transposes."""
    if matrices.stride(1) == 1:
        return descriptor_of(matrices.mT, (1, tiles.depth, tiles.columns), tiles.rows), True
    return descriptor_of(matrices, (1, tiles.columns, tiles.depth), tiles.rows), False


@triton.jit
def _tile_of_sum_of_products(
    expert, left_block, right_block, left_ptr, right_ptr, out_ptr, rows_ptr, expert_offsets_ptr,
    left_width, right_width, top_k, right_row_stride, right_column_stride,
    out_expert_stride, out_left_stride, out_right_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    start = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    lefts = left_block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    rights = right_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
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


@triton.jit
def _sum_of_products_kernel(
    left_ptr, right_ptr, out_ptr, rows_ptr, expert_offsets_ptr, num_experts,
    left_width, right_width, top_k, right_row_stride, right_column_stride,
    out_expert_stride, out_left_stride, out_right_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    if num_experts is not None:
        num_lefts, num_rights = tl.cdiv(left_width, BLOCK_ROWS), tl.cdiv(right_width, BLOCK_COLUMNS)
        of_expert = num_lefts * num_rights
        for index in range(tl.program_id(0), num_experts * of_expert, tl.num_programs(0)):
            left_block, right_block = tile_of(index % of_expert, num_lefts, num_rights)
            _tile_of_sum_of_products(
                tl.cast(index // of_expert, tl.int64), left_block, right_block, left_ptr, right_ptr, out_ptr, rows_ptr,
                expert_offsets_ptr, left_width, right_width, top_k, right_row_stride, right_column_stride,
                out_expert_stride, out_left_stride, out_right_stride, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
            )  # fmt: skip
    else:
        _tile_of_sum_of_products(
            tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1), left_ptr, right_ptr, out_ptr, rows_ptr,
            expert_offsets_ptr, left_width, right_width, top_k, right_row_stride, right_column_stride,
            out_expert_stride, out_left_stride, out_right_stride, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip


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
        expert_offsets: [num_experts + 1] int64, as from `group_by`.
        top_k: Routed rows per token.
        tiles: From `choose_tiles`.
    """
    num_experts, left_width, right_width = out.shape
    num_tiles = (triton.cdiv(left_width, tiles.rows), triton.cdiv(right_width, tiles.columns), num_experts)
    grid = choose_grid(num_tiles, tiles.multiprocessors)
    _sum_of_products_kernel[grid.shape](
        left, right, out, rows, expert_offsets, num_experts if grid.persistent else None,
        left_width, right_width, top_k, *right.stride(), *out.stride(), **tiles.options,
    )  # fmt: skip
