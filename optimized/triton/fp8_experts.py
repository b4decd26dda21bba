"""SwiGLU experts all in e4m3: two grouped products, each of rows quantized once, in groups of columns that have a scale.

The two products are kernels over routed rows sorted by expert. A step of a sum lies within one group of the rows' columns, and so
within one block of the weights': its products are added up by the matrix unit, scaled, and added in float32 to those of the steps
before. That is also the cure for Hopper's matrix units, which keep about 14 bits of a sum of e4m3 products: they add at most 128.

Tokens are quantized before they are gathered, a token once for all its experts; the activation is written in float32, since a
group may lie in two programs' tiles, and quantized by a kernel of its own. Weights are read once per block of rows, a byte each:
few rows per expert are bound by that, many by the matrix units. Where these know no e4m3 (sm_80; gfx942 has another format of
four bits of exponent), operands are read as bits and become float16, in which each number is exact.
"""

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.activations import swiglu
from gaugeblock.optimized.triton.dispatch import Blocks, group_by, positions_of, split_into_blocks, sum_rows
from gaugeblock.optimized.triton.grouped_matmul import Tiles, choose_tiles
from gaugeblock.optimized.triton.launch import device_of, multiplies_e4m3, program_columns, reject_float64, require_triton_device
from gaugeblock.optimized.triton.quantization import from_e4m3_bits, quantize_token_groups
from gaugeblock.reference import validation
from gaugeblock.reference.validation.arrays import require_dtype

LEAST_DEPTH = 32  # of a product of eight bits, on any chip


@triton.jit
def _load_numbers(ptrs, mask):
    """Return numbers of e4m3, or where they come as bits, the same in float16."""
    numbers = tl.load(ptrs, mask=mask, other=0.0)
    if numbers.dtype == tl.uint8:
        numbers = from_e4m3_bits(numbers)
    return numbers


@triton.jit
def _num_steps(depth, BLOCK_SIZE: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Return how many steps a sum has, none of which lies in two groups."""
    return depth // BLOCK_SIZE * tl.cdiv(BLOCK_SIZE, BLOCK_DEPTH) + tl.cdiv(depth % BLOCK_SIZE, BLOCK_DEPTH)


@triton.jit
def _group_and_columns(step, depth, BLOCK_SIZE: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """Return the group of a step, its columns, and which of them exist."""
    steps_of_group = tl.cdiv(BLOCK_SIZE, BLOCK_DEPTH)
    group = tl.cast(step // steps_of_group, tl.int64)
    within = step % steps_of_group * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
    columns = group * BLOCK_SIZE + within
    return group, columns, (within < BLOCK_SIZE) & (columns < depth)


@triton.jit
def _block_of(rows, num_rows, BLOCK_SIZE: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """Return the blocks that rows of a matrix lie in, or the one that all do; of rows that do not exist, the last."""
    blocks = tl.minimum(rows, num_rows - 1) // BLOCK_SIZE
    if ONE_BLOCK:
        blocks = tl.min(blocks)
    return blocks


@triton.jit
def _scaled_product(left, left_scales, matrix_ptrs, mask, scale_ptrs, ONE_BLOCK: tl.constexpr):
    """Return what a step adds to a sum: products of the numbers of one block, scaled."""
    scales = tl.load(scale_ptrs).to(tl.float32)
    product = tl.dot(left, _load_numbers(matrix_ptrs, mask))
    if ONE_BLOCK:
        product *= left_scales * scales
    else:
        product = product * left_scales * scales
    return product


@triton.jit
def _first_product_kernel(
    hidden_ptr, hidden_scales_ptr, w13_ptr, w13_scales_ptr, activation_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    hidden_size, intermediate_size, top_k,
    expert_stride, row_stride, hidden_stride, scales_expert_stride, scales_row_stride, scales_hidden_stride,
    BLOCK_SIZE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
    if is_empty:
        return
    gates = program_columns(BLOCK_COLUMNS)
    ups = gates + intermediate_size  # blocks are counted over both
    column_exists = gates < intermediate_size

    expert = tl.load(experts_ptr + block)
    tokens = tl.load(rows_ptr + positions) // top_k
    w13_ptr += expert * expert_stride
    w13_scales_ptr += expert * scales_expert_stride
    gate_scale_ptrs = w13_scales_ptr + _block_of(gates, intermediate_size, BLOCK_SIZE, ONE_BLOCK) * scales_row_stride
    up_scale_ptrs = w13_scales_ptr + _block_of(ups, 2 * intermediate_size, BLOCK_SIZE, ONE_BLOCK) * scales_row_stride
    gate = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    up = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for step in range(_num_steps(hidden_size, BLOCK_SIZE, BLOCK_DEPTH)):
        group, columns, exists = _group_and_columns(step, hidden_size, BLOCK_SIZE, BLOCK_DEPTH)
        hidden = _load_numbers(hidden_ptr + tokens * hidden_size + columns[None, :], exists[None, :])
        hidden_scales = tl.load(hidden_scales_ptr + tokens * tl.cdiv(hidden_size, BLOCK_SIZE) + group)
        mask = exists[:, None] & column_exists
        matrix_ptrs = w13_ptr + (columns * hidden_stride)[:, None]
        scale_offset = group * scales_hidden_stride
        gate += _scaled_product(
            hidden, hidden_scales, matrix_ptrs + gates * row_stride, mask, gate_scale_ptrs + scale_offset, ONE_BLOCK
        )
        up += _scaled_product(
            hidden, hidden_scales, matrix_ptrs + ups * row_stride, mask, up_scale_ptrs + scale_offset, ONE_BLOCK
        )
    activation = swiglu(gate, up)
    tl.store(activation_ptr + positions * intermediate_size + gates, activation, mask=row_exists & column_exists)


@triton.jit
def _second_product_kernel(
    left_ptr, left_scales_ptr, w2_ptr, w2_scales_ptr, out_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    hidden_size, intermediate_size,
    expert_stride, row_stride, depth_stride, scales_expert_stride, scales_row_stride, scales_depth_stride,
    BLOCK_SIZE: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
    if is_empty:
        return
    outs = program_columns(BLOCK_COLUMNS)
    column_exists = outs < hidden_size

    expert = tl.load(experts_ptr + block)
    matrix_ptrs = w2_ptr + expert * expert_stride + outs * row_stride
    w2_scales_ptr += expert * scales_expert_stride
    scale_ptrs = w2_scales_ptr + _block_of(outs, hidden_size, BLOCK_SIZE, ONE_BLOCK) * scales_row_stride
    total = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for step in range(_num_steps(intermediate_size, BLOCK_SIZE, BLOCK_DEPTH)):
        group, columns, exists = _group_and_columns(step, intermediate_size, BLOCK_SIZE, BLOCK_DEPTH)
        left = _load_numbers(left_ptr + positions * intermediate_size + columns[None, :], exists[None, :])
        left_scales = tl.load(left_scales_ptr + positions * tl.cdiv(intermediate_size, BLOCK_SIZE) + group)
        total += _scaled_product(
            left, left_scales, matrix_ptrs + (columns * depth_stride)[:, None], exists[:, None] & column_exists,
            scale_ptrs + group * scales_depth_stride, ONE_BLOCK,
        )  # fmt: skip
    rows = tl.load(rows_ptr + positions)
    tl.store(out_ptr + rows * hidden_size + outs, total, mask=row_exists & column_exists)


def _as_operand(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers of e4m3 as a kernel takes them: as bits where matrix units do not."""
    return numbers if multiplies_e4m3() else numbers.view(torch.uint8)


def _in_one_block(columns: int, width: int, block_size: int) -> bool:
    """Whether so many rows of weights, the columns of a tile, never lie in two blocks: `width` of gates, then as many ups."""
    return block_size % columns == width % columns == 0


def _tiles(w13: torch.Tensor, w2: torch.Tensor, block_size: int, *, width: int, accumulators: int) -> Tiles:
    """Choose tiles of a result of so many columns.

    The depth is a group's, as far as it fits: a step in another group is a step of its own. Bits that become float16 pass
    through registers, so their tiles are smaller; so are those whose columns have scales of their own.
    """
    tiles = choose_tiles(w13, w2, accumulators=accumulators)
    rows, depth = (tiles.rows, 2 * tiles.depth) if multiplies_e4m3() else (64, LEAST_DEPTH)
    columns = tiles.columns if _in_one_block(tiles.columns, width, block_size) else tiles.columns // 2
    return tiles._replace(rows=rows, columns=columns, depth=max(LEAST_DEPTH, min(triton.next_power_of_2(block_size), depth)))


def _first_product(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    rows: torch.Tensor,
    blocks: Blocks,
    top_k: int,
    block_size: int,
    tiles: Tiles,
) -> torch.Tensor:
    """Return silu(gate) * up, [num_rows, intermediate_size] float32 by position."""
    quantized, scales = quantize_token_groups(hidden_states, group_size=block_size)
    hidden_size, intermediate_size = w13.shape[2], w13.shape[1] // 2
    activation = hidden_states.new_empty(rows.shape[0], intermediate_size, dtype=torch.float32)
    grid = (blocks.experts.shape[0], triton.cdiv(intermediate_size, tiles.columns))
    _first_product_kernel[grid](
        _as_operand(quantized), scales, _as_operand(w13), w13_scales, activation, rows, *blocks,
        hidden_size, intermediate_size, top_k, *w13.stride(), *w13_scales.stride(),
        BLOCK_SIZE=block_size, ONE_BLOCK=_in_one_block(tiles.columns, intermediate_size, block_size), **tiles.options,
    )  # fmt: skip
    return activation


def _second_product(
    activation: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    rows: torch.Tensor,
    blocks: Blocks,
    block_size: int,
    tiles: Tiles,
) -> torch.Tensor:
    """Return the experts' outputs, [num_rows, hidden_size] float32 by routed row."""
    quantized, scales = quantize_token_groups(activation, group_size=block_size)
    hidden_size, intermediate_size = w2.shape[1:]
    out = activation.new_empty(rows.shape[0], hidden_size)
    grid = (blocks.experts.shape[0], triton.cdiv(hidden_size, tiles.columns))
    _second_product_kernel[grid](
        _as_operand(quantized), scales, _as_operand(w2), w2_scales, out, rows, *blocks,
        hidden_size, intermediate_size, *w2.stride(), *w2_scales.stride(),
        BLOCK_SIZE=block_size, ONE_BLOCK=_in_one_block(tiles.columns, hidden_size, block_size), **tiles.options,
    )  # fmt: skip
    return out


def fused_swiglu_fp8(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    block_size: int,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts to each token, all in e4m3, and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2'[e] @ q(silu(gate) * up)
        gate, up = the halves of w13'[e] @ q(hidden_states[t]),  e = topk_ids[t, j]
        w'[r, c] = w[r, c] * scales[r // block_size, c // block_size],  q: `quantization.quantize_token_groups` and back

    Numbers of e4m3 are multiplied as they are and added up in float32; the sums of a block are scaled. Any strides will do. For
    inference: nothing has a gradient.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w13: [num_experts, 2 * intermediate_size, hidden_size], float8_e4m3fn, gate rows, then up rows.
        w13_scales: [num_experts, ceil(2 * intermediate_size / block_size), ceil(hidden_size / block_size)], bfloat16, float16 or
            float32. Blocks are counted over gate and up rows together.
        w2: [num_experts, hidden_size, intermediate_size], float8_e4m3fn.
        w2_scales: [num_experts, ceil(hidden_size / block_size), ceil(intermediate_size / block_size)], bfloat16, float16 or
            float32.
        topk_weights: [num_tokens, top_k], bfloat16, float16 or float32.
        topk_ids: [num_tokens, top_k], integer, each in 0..num_experts - 1. An id given twice counts twice.
        block_size: Rows and columns of a block, columns of a group. The last ones may have fewer.

    Returns:
        [num_tokens, hidden_size], dtype of hidden_states.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or block_size no integer.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, block_size is below 1, or Triton cannot
            run on the device.

    Source: `gaugeblock.reference.torch.quantized_experts.fused_swiglu_fp8`.
    """
    validation.fused_swiglu_fp8(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids, block_size)
    floating = {"hidden_states": hidden_states, "w13_scales": w13_scales, "w2_scales": w2_scales, "topk_weights": topk_weights}
    for name, tensor in floating.items():
        reject_float64(name, tensor)
    for name, weights in (("w13", w13), ("w2", w2)):
        require_dtype(name, weights, ("float8_e4m3fn",))
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    require_triton_device("hidden_states", hidden_states)
    with device_of(hidden_states):
        rows, expert_offsets = group_by(topk_ids, w13.shape[0])
        first_tiles = _tiles(w13, w2, block_size, width=w2.shape[2], accumulators=2)
        tiles = _tiles(w13, w2, block_size, width=w2.shape[1], accumulators=1)
        blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)
        activation = _first_product(hidden_states, w13, w13_scales, rows, blocks, topk_ids.shape[1], block_size, first_tiles)
        out = _second_product(activation, w2, w2_scales, rows, blocks, block_size, tiles)
        return sum_rows(out.view(*topk_ids.shape, 1, out.shape[1]), topk_weights, hidden_states.dtype)
