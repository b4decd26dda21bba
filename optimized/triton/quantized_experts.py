"""SwiGLU experts of int8 weights in three kernels forward and four backward, over routed rows sorted by expert.

The kernels are those of `experts.py` but for what they multiply by. An integer of eight bits is exact in every floating dtype, so
that a product which sums along a weight's row takes the integers as they are, and the row's scale afterwards, once for each
result: forward, and where gate and up are computed again. Backward, sums run across rows, each with its scale: tiles of weights
are scaled in float32 and rounded to the dtype of the tokens. Weights are read once per block of rows, a byte each.

Gradients are those of tokens and router weights; integers have none, and scales are constants.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.activations import activate_backward, swiglu
from gaugeblock.optimized.triton.dispatch import Blocks, group_by, positions_of, split_into_blocks, sum_rows
from gaugeblock.optimized.triton.grouped_matmul import Tiles, choose_tiles
from gaugeblock.optimized.triton.launch import device_of, program_columns, reject_float64, require_triton_device
from gaugeblock.reference import validation


@triton.jit
def _add_products(
    total, left_ptrs, left_stride, matrix_ptrs, matrix_stride, scales_ptr, scales_stride, depth, column_exists,
    BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Return total + left @ matrix; `scales_ptr`, if there are any, are those of the matrix' rows along the depth."""
    for first in range(0, depth, BLOCK_DEPTH):
        steps = first + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        exists = steps < depth
        left = tl.load(left_ptrs + (steps * left_stride)[None, :], mask=exists[None, :], other=0.0)
        # any integer will do where there is none: it meets a 0, or is not stored
        matrix = tl.load(matrix_ptrs + (steps * matrix_stride)[:, None], mask=exists[:, None] & column_exists)
        if scales_ptr is None:
            weights = matrix.to(left.dtype)
        else:
            scales = tl.load(scales_ptr + steps * scales_stride, mask=exists, other=0.0).to(tl.float32)
            weights = (matrix * scales[:, None]).to(left.dtype)
        total = tl.dot(left, weights, total, input_precision="ieee")
    return total


@triton.jit
def _gate_and_up(
    hidden_ptrs, hidden_stride, hidden_size, w13_ptr, scales_ptr, columns, column_exists, intermediate_size,
    row_stride, depth_stride, scales_stride, zeros, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Return gate and up of one expert, whose weights and scales the pointers are; each with the scale of its row."""
    ups = intermediate_size + columns
    gate = _add_products(
        zeros, hidden_ptrs, hidden_stride, w13_ptr + columns * row_stride, depth_stride, None, 0, hidden_size, column_exists,
        BLOCK_DEPTH,
    )  # fmt: skip
    up = _add_products(
        zeros, hidden_ptrs, hidden_stride, w13_ptr + ups * row_stride, depth_stride, None, 0, hidden_size, column_exists,
        BLOCK_DEPTH,
    )  # fmt: skip
    gate *= tl.load(scales_ptr + columns * scales_stride, mask=column_exists, other=0.0)
    up *= tl.load(scales_ptr + ups * scales_stride, mask=column_exists, other=0.0)
    return gate, up


@triton.jit
def _first_product_kernel(
    hidden_ptr, w13_ptr, scales_ptr, activation_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    hidden_size, intermediate_size, top_k, token_stride, hidden_stride,
    w13_expert_stride, w13_row_stride, w13_hidden_stride, scales_expert_stride, scales_row_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
    if is_empty:
        return
    columns = program_columns(BLOCK_COLUMNS)
    column_exists = columns < intermediate_size

    expert = tl.load(experts_ptr + block)
    hidden_ptrs = hidden_ptr + tl.load(rows_ptr + positions) // top_k * token_stride
    gate, up = _gate_and_up(
        hidden_ptrs, hidden_stride, hidden_size, w13_ptr + expert * w13_expert_stride, scales_ptr + expert * scales_expert_stride,
        columns, column_exists, intermediate_size, w13_row_stride, w13_hidden_stride, scales_row_stride,
        tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32), BLOCK_DEPTH,
    )  # fmt: skip
    activation = swiglu(gate, up)
    tl.store(activation_ptr + positions * intermediate_size + columns, activation, mask=row_exists & column_exists)


@triton.jit
def _rows_times_quantized_kernel(
    left_ptr, matrices_ptr, scales_ptr, out_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    width, depth, expert_stride, column_stride, depth_stride, scales_expert_stride, scales_stride,
    SCALES_OF_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
    if is_empty:
        return
    columns = program_columns(BLOCK_COLUMNS)
    column_exists = columns < width

    expert = tl.load(experts_ptr + block)
    scales_ptr += expert * scales_expert_stride
    total = _add_products(
        tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32), left_ptr + positions * depth, 1,
        matrices_ptr + expert * expert_stride + columns * column_stride, depth_stride,
        None if SCALES_OF_COLUMNS else scales_ptr, scales_stride, depth, column_exists, BLOCK_DEPTH,
    )  # fmt: skip
    if SCALES_OF_COLUMNS:
        total *= tl.load(scales_ptr + columns * scales_stride, mask=column_exists, other=0.0)
    rows = tl.load(rows_ptr + positions)
    tl.store(out_ptr + rows * width + columns, total, mask=row_exists & column_exists)


@triton.jit
def _through_activation_kernel(
    hidden_ptr, out_gradient_ptr, w13_ptr, w13_scales_ptr, w2_ptr, w2_scales_ptr, topk_weights_ptr,
    gradient_ptr, weight_summands_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    num_rows, hidden_size, intermediate_size, top_k, token_stride, hidden_stride, gradient_token_stride, gradient_hidden_stride,
    w13_expert_stride, w13_row_stride, w13_hidden_stride, w13_scales_expert_stride, w13_scales_row_stride,
    w2_expert_stride, w2_hidden_stride, w2_column_stride, w2_scales_expert_stride, w2_scales_hidden_stride,
    weights_token_stride, weights_choice_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
    if is_empty:
        return
    rows = tl.load(rows_ptr + positions)
    tokens = rows // top_k
    column_block = tl.program_id(1).to(tl.int64)
    columns = program_columns(BLOCK_COLUMNS)
    column_exists = columns < intermediate_size

    expert = tl.load(experts_ptr + block)
    zeros = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    gate, up = _gate_and_up(
        hidden_ptr + tokens * token_stride, hidden_stride, hidden_size,
        w13_ptr + expert * w13_expert_stride, w13_scales_ptr + expert * w13_scales_expert_stride,
        columns, column_exists, intermediate_size, w13_row_stride, w13_hidden_stride, w13_scales_row_stride, zeros, BLOCK_DEPTH,
    )  # fmt: skip
    product = _add_products(  # out_gradient @ w2
        zeros, out_gradient_ptr + tokens * gradient_token_stride, gradient_hidden_stride,
        w2_ptr + expert * w2_expert_stride + columns * w2_column_stride, w2_hidden_stride,
        w2_scales_ptr + expert * w2_scales_expert_stride, w2_scales_hidden_stride, hidden_size, column_exists, BLOCK_DEPTH,
    )  # fmt: skip

    weight_ptrs = topk_weights_ptr + tokens * weights_token_stride + rows % top_k * weights_choice_stride
    slope = tl.load(weight_ptrs) * product
    activation, gate_gradient, up_gradient = activate_backward(gate, up, slope, 1.0, 0.0, NONLINEARITY="silu", GATED=True)
    # an infinite token has NaN in columns that do not exist
    partial = tl.sum(tl.where(column_exists, activation * product, 0.0), axis=1)
    tl.store(weight_summands_ptr + column_block * num_rows + rows, partial[:, None], mask=row_exists)
    mask = row_exists & column_exists
    gradient_ptrs = gradient_ptr + positions * (2 * intermediate_size) + columns
    tl.store(gradient_ptrs, gate_gradient, mask=mask)
    tl.store(gradient_ptrs + intermediate_size, up_gradient, mask=mask)


def _first_product(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    rows: torch.Tensor,
    blocks: Blocks,
    top_k: int,
    tiles: Tiles,
) -> torch.Tensor:
    """Return silu(gate) * up, [num_rows, intermediate_size] by position, in the dtype of hidden_states."""
    num_rows, hidden_size, intermediate_size = rows.shape[0], hidden_states.shape[1], w13.shape[1] // 2
    activation = hidden_states.new_empty(num_rows, intermediate_size)
    grid = (blocks.experts.shape[0], triton.cdiv(intermediate_size, tiles.columns))
    _first_product_kernel[grid](
        hidden_states, w13, w13_scales, activation, rows, *blocks, hidden_size, intermediate_size, top_k,
        *hidden_states.stride(), *w13.stride(), *w13_scales.stride(), **tiles.options,
    )  # fmt: skip
    return activation


def _rows_times_quantized(
    left: torch.Tensor,
    matrices: torch.Tensor,
    scales: torch.Tensor,
    rows: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
    *,
    scales_of_columns: bool,
) -> torch.Tensor:
    """Multiply each row by the matrix of its expert.

        out[rows[p]] = (scales[e][:, None] * matrices[e]) @ left[p], or (matrices[e] * scales[e]) @ left[p]

    Args:
        left: [num_rows, depth], contiguous, sorted by expert.
        matrices: [num_experts, width, depth] int8, any strides.
        scales: [num_experts, width] with `scales_of_columns`, else [num_experts, depth].
        rows: [num_rows] int64, the routed row at each position.
        blocks: Of tiles.rows positions.
        tiles: From `choose_tiles`.
        scales_of_columns: Whether each column of the result has a scale, or each step of the sum.

    Returns:
        [num_rows, width] float32.
    """
    num_rows, depth = left.shape
    width = matrices.shape[1]
    out = torch.empty(num_rows, width, dtype=torch.float32, device=left.device)
    grid = (blocks.experts.shape[0], triton.cdiv(width, tiles.columns))
    _rows_times_quantized_kernel[grid](
        left, matrices, scales, out, rows, *blocks, width, depth, *matrices.stride(), *scales.stride(),
        SCALES_OF_COLUMNS=scales_of_columns, **tiles.options,
    )  # fmt: skip
    return out


def _through_activation(
    hidden_states: torch.Tensor,
    out_gradient: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    topk_weights: torch.Tensor,
    rows: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what both gradients are made of.

    Returns:
        gradient: [num_rows, 2 * intermediate_size] by position, of gate and up, in the dtype of hidden_states.
        weight_summands: [column blocks, num_rows] by routed row, float32; their sum is a router weight's gradient.
    """
    num_rows, (hidden_size, intermediate_size) = rows.shape[0], w2.shape[1:]
    grid = (blocks.experts.shape[0], triton.cdiv(intermediate_size, tiles.columns))
    gradient = hidden_states.new_empty(num_rows, 2 * intermediate_size)
    weight_summands = hidden_states.new_empty(grid[1], num_rows, dtype=torch.float32)
    _through_activation_kernel[grid](
        hidden_states, out_gradient, w13, w13_scales, w2, w2_scales, topk_weights, gradient, weight_summands, rows, *blocks,
        num_rows, hidden_size, intermediate_size, topk_weights.shape[1],
        *hidden_states.stride(), *out_gradient.stride(), *w13.stride(), *w13_scales.stride(), *w2.stride(), *w2_scales.stride(),
        *topk_weights.stride(), **tiles.options,
    )  # fmt: skip
    return gradient, weight_summands


class _FusedSwigluInt8(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w13_scales: torch.Tensor,
        w2: torch.Tensor,
        w2_scales: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        rows, expert_offsets = group_by(topk_ids, w13.shape[0])
        ctx.save_for_backward(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, rows, expert_offsets)

        tiles = choose_tiles(hidden_states, w13, w2)
        first_tiles = choose_tiles(hidden_states, w13, w2, accumulators=2)
        blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)
        activation = _first_product(hidden_states, w13, w13_scales, rows, blocks, topk_ids.shape[1], first_tiles)
        out = _rows_times_quantized(activation, w2, w2_scales, rows, blocks, tiles, scales_of_columns=True)
        return sum_rows(out.view(*topk_ids.shape, 1, out.shape[1]), topk_weights, hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, rows, expert_offsets = ctx.saved_tensors
        hidden_gradient = weights_gradient = None
        with device_of(out_gradient):
            operands = (hidden_states, out_gradient, w13, w2)
            tiles = choose_tiles(*operands)
            first_tiles = choose_tiles(*operands, accumulators=3)
            blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)
            gradient, weight_summands = _through_activation(
                hidden_states, out_gradient, w13, w13_scales, w2, w2_scales, topk_weights, rows, blocks, first_tiles
            )
            if ctx.needs_input_grad[0]:
                row_gradients = _rows_times_quantized(gradient, w13.mT, w13_scales, rows, blocks, tiles, scales_of_columns=False)
                row_gradients = row_gradients.view(*topk_weights.shape, 1, row_gradients.shape[1])
                hidden_gradient = sum_rows(row_gradients, None, hidden_states.dtype)
            if ctx.needs_input_grad[5]:
                # blocks of columns are to a routed row what its choices are to a token
                summands = weight_summands[None, :, None]
                weights_gradient = sum_rows(summands, None, topk_weights.dtype).view_as(topk_weights)
        return hidden_gradient, None, None, None, None, weights_gradient, None


def fused_swiglu_int8(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts of int8 weights to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2_scales[e] * (w2[e] @ (silu(gate) * up))
        gate, up = the halves of w13_scales[e] * (w13[e] @ hidden_states[t]),  e = topk_ids[t, j]

    Products are added up in float32, those of float32 inputs exact (no tf32). silu(gate) * up is rounded to the dtype of
    hidden_states before it is multiplied by w2; so are, backward, the gradients of gate and up and the scaled weights. Any
    strides will do. Differentiable once, in hidden_states and topk_weights.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w13: [num_experts, 2 * intermediate_size, hidden_size], int8, gate rows, then up rows.
        w13_scales: [num_experts, 2 * intermediate_size], bfloat16, float16 or float32.
        w2: [num_experts, hidden_size, intermediate_size], int8.
        w2_scales: [num_experts, hidden_size], bfloat16, float16 or float32.
        topk_weights: [num_tokens, top_k], bfloat16, float16 or float32.
        topk_ids: [num_tokens, top_k], integer, each in 0..num_experts - 1. An id given twice counts twice.

    Returns:
        [num_tokens, hidden_size], dtype of hidden_states.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or Triton cannot run
            on the device.

    Source: `gaugeblock.reference.torch.quantized_experts.fused_swiglu_int8`.
    """
    validation.fused_swiglu_int8(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids)
    floating = {"hidden_states": hidden_states, "w13_scales": w13_scales, "w2_scales": w2_scales, "topk_weights": topk_weights}
    for name, tensor in floating.items():
        reject_float64(name, tensor)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    require_triton_device("hidden_states", hidden_states)
    with device_of(hidden_states):
        return _FusedSwigluInt8.apply(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids)
