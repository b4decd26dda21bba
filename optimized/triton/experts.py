"""SwiGLU experts in three kernels forward and six backward, over routed rows sorted by expert.

Forward: `_gate_up` gathers tokens, multiplies them by both halves of w13 and writes silu(gate) * up in the
dtype of the inputs; `rows_times_matrices` multiplies that by w2 into float32 rows; `sum_rows` adds up the
rows of each token, weighted, in the order of its choices, and rounds once. Nothing is added by atomics, so
that every run gives the same bits, and no token's bits depend on its batch.

Backward keeps nothing of the forward pass but its inputs and their order. `_gate_up_backward` computes gate
and up again, beside out_gradient @ w2, in one loop over hidden_size. A training step has 2/9 more products
so, and saves the 8 bytes per routed row and intermediate column that gate and up are. All four gradients
come from there: of topk_weights, as <activation, out_gradient @ w2>, which is <expert output, out_gradient>
without the output; of w13 and w2, as sums over each expert's rows; of the tokens, as rows, summed as in the
forward pass.

w13 and w2 are read once per block of rows, from cache where an expert has several; tokens once per block of
columns. Many rows per expert are bound by the matrix units, few by reading w13 and w2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.dispatch import Blocks, sort_by_expert, split_into_blocks, sum_rows
from gaugeblock.optimized.triton.grouped_matmul import Tiles, choose_tiles, rows_times_matrices, sum_of_products
from gaugeblock.optimized.triton.launch import device_of, require_triton_device
from gaugeblock.reference import validation


@triton.jit
def _gate_up_kernel(
    hidden_ptr, w13_ptr, activation_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    hidden_size, intermediate_size, top_k,
    token_stride, hidden_stride, w13_expert_stride, w13_row_stride, w13_hidden_stride,
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
    column_exists = columns < intermediate_size

    hidden_ptrs = hidden_ptr + tl.load(rows_ptr + positions) // top_k * token_stride
    w13_ptr += tl.load(experts_ptr + block) * w13_expert_stride
    gate_ptrs = w13_ptr + columns * w13_row_stride
    up_ptrs = w13_ptr + (intermediate_size + columns) * w13_row_stride
    gate = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    up = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, hidden_size, BLOCK_DEPTH):
        steps = first + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        exists = steps < hidden_size
        weight_mask = exists[:, None] & column_exists
        w13_offsets = (steps * w13_hidden_stride)[:, None]
        hidden = tl.load(hidden_ptrs + (steps * hidden_stride)[None, :], mask=exists[None, :], other=0.0)
        w1 = tl.load(gate_ptrs + w13_offsets, mask=weight_mask, other=0.0)
        w3 = tl.load(up_ptrs + w13_offsets, mask=weight_mask, other=0.0)
        gate = tl.dot(hidden, w1, gate, input_precision="ieee")
        up = tl.dot(hidden, w3, up, input_precision="ieee")

    decay = tl.exp(-tl.abs(gate))  # not exp(-gate), which overflows
    silu = gate * tl.where(gate < 0, decay, 1.0) / (1.0 + decay)
    activation_ptrs = activation_ptr + positions * intermediate_size + columns
    tl.store(activation_ptrs, silu * up, mask=row_exists & column_exists)


def _gate_up(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    rows: torch.Tensor,
    blocks: Blocks,
    top_k: int,
    tiles: Tiles,
) -> torch.Tensor:
    """Return silu(gate) * up, [num_rows, intermediate_size] by position, in the dtype of hidden_states."""
    num_rows, hidden_size, intermediate_size = rows.shape[0], hidden_states.shape[1], w13.shape[1] // 2
    activation = hidden_states.new_empty(num_rows, intermediate_size)
    grid = (blocks.experts.shape[0], triton.cdiv(intermediate_size, tiles.columns))
    _gate_up_kernel[grid](
        hidden_states, w13, activation, rows, *blocks,
        hidden_size, intermediate_size, top_k, *hidden_states.stride(), *w13.stride(), **tiles.options,
    )  # fmt: skip
    return activation


@triton.jit
def _gate_up_backward_kernel(
    hidden_ptr, out_gradient_ptr, w13_ptr, w2_ptr, topk_weights_ptr,
    gate_up_gradient_ptr, activation_ptr, weight_summands_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    num_rows, hidden_size, intermediate_size, top_k,
    token_stride, hidden_stride, gradient_token_stride, gradient_hidden_stride,
    w13_expert_stride, w13_row_stride, w13_hidden_stride,
    w2_expert_stride, w2_hidden_stride, w2_column_stride, weights_token_stride, weights_choice_stride,
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
    rows = tl.load(rows_ptr + positions)
    tokens = rows // top_k
    column_block = tl.program_id(1).to(tl.int64)
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    column_exists = columns < intermediate_size

    expert = tl.load(experts_ptr + block)
    w13_ptr += expert * w13_expert_stride
    hidden_ptrs = hidden_ptr + tokens * token_stride
    gradient_ptrs = out_gradient_ptr + tokens * gradient_token_stride
    gate_ptrs = w13_ptr + columns * w13_row_stride
    up_ptrs = w13_ptr + (intermediate_size + columns) * w13_row_stride
    w2_ptrs = w2_ptr + expert * w2_expert_stride + columns * w2_column_stride
    gate = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    up = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    product = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)  # out_gradient @ w2
    for first in range(0, hidden_size, BLOCK_DEPTH):
        steps = first + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        exists = steps < hidden_size
        row_mask = exists[None, :]
        weight_mask = exists[:, None] & column_exists
        w13_offsets = (steps * w13_hidden_stride)[:, None]
        hidden = tl.load(hidden_ptrs + (steps * hidden_stride)[None, :], mask=row_mask, other=0.0)
        w1 = tl.load(gate_ptrs + w13_offsets, mask=weight_mask, other=0.0)
        w3 = tl.load(up_ptrs + w13_offsets, mask=weight_mask, other=0.0)
        gate = tl.dot(hidden, w1, gate, input_precision="ieee")
        up = tl.dot(hidden, w3, up, input_precision="ieee")
        gradient_offsets = (steps * gradient_hidden_stride)[None, :]
        gradient = tl.load(gradient_ptrs + gradient_offsets, mask=row_mask, other=0.0)
        w2 = tl.load(w2_ptrs + (steps * w2_hidden_stride)[:, None], mask=weight_mask, other=0.0)
        product = tl.dot(gradient, w2, product, input_precision="ieee")

    decay = tl.exp(-tl.abs(gate))  # not exp(-gate), which overflows
    sigmoid = tl.where(gate < 0, decay, 1.0) / (1.0 + decay)
    silu = gate * sigmoid
    activation = silu * up
    # an infinite token has NaN in columns that do not exist
    partial = tl.sum(tl.where(column_exists, activation * product, 0.0), axis=1)
    tl.store(weight_summands_ptr + column_block * num_rows + rows, partial[:, None], mask=row_exists)

    weight_ptrs = topk_weights_ptr + tokens * weights_token_stride + rows % top_k * weights_choice_stride
    weights = tl.load(weight_ptrs).to(tl.float32)
    mask = row_exists & column_exists
    tl.store(activation_ptr + positions * intermediate_size + columns, weights * activation, mask=mask)
    product *= weights
    gate_ptrs = gate_up_gradient_ptr + positions * (2 * intermediate_size) + columns
    tl.store(gate_ptrs, product * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=mask)
    tl.store(gate_ptrs + intermediate_size, product * silu, mask=mask)


def _gate_up_backward(
    hidden_states: torch.Tensor,
    out_gradient: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    rows: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute what all gradients are made of.

    Returns:
        gate_up_gradient: [num_rows, 2 * intermediate_size] by position, in the dtype of hidden_states.
        activation: [num_rows, intermediate_size] by position, times topk_weights; same dtype.
        weight_summands: [column blocks, num_rows] by routed row, float32; their sum is a weight's gradient.
    """
    num_rows, hidden_size, intermediate_size = rows.shape[0], *w2.shape[1:]
    grid = (blocks.experts.shape[0], triton.cdiv(intermediate_size, tiles.columns))
    gate_up_gradient = hidden_states.new_empty(num_rows, 2 * intermediate_size)
    activation = hidden_states.new_empty(num_rows, intermediate_size)
    weight_summands = hidden_states.new_empty(grid[1], num_rows, dtype=torch.float32)
    _gate_up_backward_kernel[grid](
        hidden_states, out_gradient, w13, w2, topk_weights,
        gate_up_gradient, activation, weight_summands, rows, *blocks,
        num_rows, hidden_size, intermediate_size, topk_weights.shape[1],
        *hidden_states.stride(), *out_gradient.stride(), *w13.stride(), *w2.stride(), *topk_weights.stride(),
        **tiles.options,
    )  # fmt: skip
    return gate_up_gradient, activation, weight_summands


class _FusedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        rows, expert_offsets = sort_by_expert(topk_ids, num_experts=w13.shape[0])
        ctx.save_for_backward(hidden_states, w13, w2, topk_weights, rows, expert_offsets)

        operands = (hidden_states, w13, w2)
        tiles = choose_tiles(*operands)
        gate_up_tiles = choose_tiles(*operands, accumulators=2)
        blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)
        activation = _gate_up(hidden_states, w13, rows, blocks, topk_ids.shape[1], gate_up_tiles)
        expert_out = rows_times_matrices(activation, w2, rows, blocks, tiles)
        expert_out = expert_out.view(*topk_ids.shape, hidden_states.shape[1])
        return sum_rows(expert_out, topk_weights, hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, w13, w2, topk_weights, rows, expert_offsets = ctx.saved_tensors
        needs_hidden, needs_w13, needs_w2, needs_weights, _ = ctx.needs_input_grad
        hidden_gradient = w13_gradient = w2_gradient = weights_gradient = None

        operands = (hidden_states, out_gradient, w13, w2)
        tiles = choose_tiles(*operands)
        gate_up_tiles = choose_tiles(*operands, accumulators=3)
        blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)
        gate_up_gradient, activation, weight_summands = _gate_up_backward(*operands, topk_weights, rows, blocks, gate_up_tiles)
        if needs_hidden:
            row_gradients = rows_times_matrices(gate_up_gradient, w13.mT, rows, blocks, tiles)
            row_gradients = row_gradients.view(*topk_weights.shape, hidden_states.shape[1])
            hidden_gradient = sum_rows(row_gradients, None, hidden_states.dtype)
        if needs_weights:
            # blocks of columns are to a routed row what its choices are to a token
            weights_gradient = sum_rows(weight_summands[None], None, topk_weights.dtype).view_as(topk_weights)

        of_rows = (rows, expert_offsets, topk_weights.shape[1], tiles)
        if needs_w13:
            w13_gradient = w13.new_empty(w13.shape)
            sum_of_products(gate_up_gradient, hidden_states, w13_gradient, *of_rows)
        if needs_w2:
            w2_gradient = w2.new_empty(w2.shape)
            sum_of_products(activation, out_gradient, w2_gradient.mT, *of_rows)
        return hidden_gradient, w13_gradient, w2_gradient, weights_gradient, None


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Products are added up in float32, those of float32 inputs exact (no tf32). silu(gate) * up is rounded to
    the dtype of hidden_states before it is multiplied by w2; so are, backward, topk_weights * silu(gate) * up
    and the gradients of gate and up. Any strides will do. Differentiable once, in all but topk_ids.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows; same dtype.
        w2: [num_experts, hidden_size, intermediate_size]; same dtype.
        topk_weights: [num_tokens, top_k], bfloat16, float16 or float32.
        topk_ids: [num_tokens, top_k], integer, each in 0..num_experts - 1. An id given twice counts twice.

    Returns:
        [num_tokens, hidden_size], dtype of hidden_states.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or Triton cannot run
            on the device.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`.
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    for name, tensor in (("hidden_states", hidden_states), ("topk_weights", topk_weights)):
        if tensor.dtype == torch.float64:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got float64")
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    require_triton_device("hidden_states", hidden_states)
    with device_of(hidden_states):
        return _FusedSwiglu.apply(hidden_states, w13, w2, topk_weights, topk_ids)
