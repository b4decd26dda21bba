"""An expert's first product with its activation, forward, and all that the backward pass is made of: a kernel each.

`first_product` gathers tokens, multiplies them by the first matrix of their expert, adds its biases and writes the
activation in the dtype of the inputs. `through_activation` multiplies gradients of outputs by the second matrix and
goes through the activation, for which it needs the pre-activations: as `first_product` kept them, or computed again
beside its own product, in one loop.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gaugeblock.optimized.triton.activations import Activation, activate, activate_backward, distance_to_up, rows_of
from gaugeblock.optimized.triton.dispatch import Blocks, positions_of
from gaugeblock.optimized.triton.grouped_matmul import Tiles
from gaugeblock.optimized.triton.launch import program_columns
from gaugeblock.optimized.triton.persistent import choose_grid, descriptor_of, tile_of


class Expert(NamedTuple):
    """Weights of all experts: w2[e] @ activation(w1[e] @ x + b1[e]) + b2[e].

    Attributes:
        w1: [num_experts, products * intermediate_size, hidden_size], any strides; products are 2 of a gated activation, else 1.
        b1: [num_experts, products * intermediate_size], or None.
        w2: [num_experts, hidden_size, intermediate_size].
        b2: [num_experts, hidden_size], or None.
    """

    w1: torch.Tensor
    b1: torch.Tensor | None
    w2: torch.Tensor
    b2: torch.Tensor | None

    @property
    def bias_strides(self) -> tuple[int, ...]:
        """Those of b1 and b2; 0 where there is none."""
        return tuple(stride for bias in (self.b1, self.b2) for stride in ((0, 0) if bias is None else bias.stride()))


@triton.jit
def _tile_of_first_product(
    block, positions, row_exists, column_block, hidden_ptr, w1_ptr, w1_descriptor, b1_ptr, activation_ptr, kept_ptr, rows_ptr,
    experts_ptr, hidden_size, intermediate_size, top_k, token_stride, hidden_stride,
    w1_expert_stride, w1_row_stride, w1_hidden_stride, b1_expert_stride, b1_row_stride, alpha, limit,
    NONLINEARITY: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    columns = column_block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    column_exists = columns < intermediate_size
    gate_rows, up_rows = rows_of(columns, intermediate_size, GATED, INTERLEAVED)

    expert = tl.load(experts_ptr + block)
    hidden_ptrs = hidden_ptr + tl.load(rows_ptr + positions) // top_k * token_stride
    w1_gate_ptrs = w1_ptr + expert * w1_expert_stride + gate_rows * w1_row_stride
    up_distance = distance_to_up(w1_row_stride, intermediate_size, INTERLEAVED)
    gate = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    up = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, hidden_size, BLOCK_DEPTH):
        steps = first + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        exists = steps < hidden_size
        weight_mask = exists[:, None] & column_exists
        w1_ptrs = w1_gate_ptrs + (steps * w1_hidden_stride)[:, None]
        hidden = tl.load(hidden_ptrs + (steps * hidden_stride)[None, :], mask=exists[None, :], other=0.0)
        if w1_descriptor is None:
            of_gate = tl.load(w1_ptrs, mask=weight_mask, other=0.0)
        else:
            of_gate = w1_descriptor.load([expert.to(tl.int32), 0, column_block * BLOCK_COLUMNS, first])
            of_gate = of_gate.reshape(BLOCK_COLUMNS, BLOCK_DEPTH).T
        gate = tl.dot(hidden, of_gate, gate, input_precision="ieee")
        if GATED:
            if w1_descriptor is None:
                of_up = tl.load(w1_ptrs + up_distance, mask=weight_mask, other=0.0)
            else:
                of_up = w1_descriptor.load([expert.to(tl.int32), 1, column_block * BLOCK_COLUMNS, first])
                of_up = of_up.reshape(BLOCK_COLUMNS, BLOCK_DEPTH).T
            up = tl.dot(hidden, of_up, up, input_precision="ieee")

    if b1_ptr is not None:
        b1_ptr += expert * b1_expert_stride
        gate += tl.load(b1_ptr + gate_rows * b1_row_stride, mask=column_exists, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(b1_ptr + up_rows * b1_row_stride, mask=column_exists, other=0.0).to(tl.float32)
    mask = row_exists & column_exists
    if kept_ptr is not None:
        kept_ptrs = kept_ptr + positions * (intermediate_size * (2 if GATED else 1))
        tl.store(kept_ptrs + columns, gate, mask=mask)
        if GATED:
            tl.store(kept_ptrs + intermediate_size + columns, up, mask=mask)
    activation = activate(gate, up, alpha, limit, NONLINEARITY, GATED)
    tl.store(activation_ptr + positions * intermediate_size + columns, activation, mask=mask)


@triton.jit(do_not_specialize=["num_blocks"])
def _first_product_kernel(
    hidden_ptr, w1_ptr, w1_descriptor, b1_ptr, activation_ptr, kept_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr, num_blocks,
    hidden_size, intermediate_size, top_k, token_stride, hidden_stride,
    w1_expert_stride, w1_row_stride, w1_hidden_stride, b1_expert_stride, b1_row_stride, alpha, limit,
    NONLINEARITY: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    if num_blocks is not None:
        num_column_blocks = tl.cdiv(intermediate_size, BLOCK_COLUMNS)
        for index in range(tl.program_id(0), num_blocks * num_column_blocks, tl.num_programs(0)):
            block, column_block = tile_of(index, num_blocks, num_column_blocks)
            positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
            if not is_empty:
                _tile_of_first_product(
                    block, positions, row_exists, column_block,
                    hidden_ptr, w1_ptr, w1_descriptor, b1_ptr, activation_ptr, kept_ptr, rows_ptr, experts_ptr,
                    hidden_size, intermediate_size, top_k, token_stride, hidden_stride, w1_expert_stride, w1_row_stride,
                    w1_hidden_stride, b1_expert_stride, b1_row_stride, alpha, limit,
                    NONLINEARITY, GATED, INTERLEAVED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
                )  # fmt: skip
    else:
        block = tl.program_id(0)
        positions, row_exists, is_empty = positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS)
        if is_empty:
            return
        _tile_of_first_product(
            block, positions, row_exists, tl.program_id(1),
            hidden_ptr, w1_ptr, w1_descriptor, b1_ptr, activation_ptr, kept_ptr, rows_ptr, experts_ptr,
            hidden_size, intermediate_size, top_k, token_stride, hidden_stride, w1_expert_stride, w1_row_stride,
            w1_hidden_stride, b1_expert_stride, b1_row_stride, alpha, limit,
            NONLINEARITY, GATED, INTERLEAVED, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_DEPTH,
        )  # fmt: skip


def first_product(
    hidden_states: torch.Tensor,
    expert: Expert,
    activation: Activation,
    rows: torch.Tensor,
    blocks: Blocks,
    top_k: int,
    tiles: Tiles,
    *,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the activation of each routed row, and keep the pre-activations for `through_activation` if that is asked for.

    Returns:
        activation: [num_rows, intermediate_size] by position, in the dtype of hidden_states.
        kept: [num_rows, products * intermediate_size] by position, of gate, then of up, float32; or None.
    """
    num_rows, intermediate_size = rows.shape[0], expert.w2.shape[2]
    out = hidden_states.new_empty(num_rows, intermediate_size)
    kept = hidden_states.new_empty(num_rows, expert.w1.shape[1], dtype=torch.float32) if keep else None
    num_blocks = blocks.experts.shape[0]
    # what is interleaved has no descriptor, since its gates lie farther apart than gate and up; by pointers, sm_100 spills
    multiprocessors = None if activation.interleaved else tiles.multiprocessors
    grid = choose_grid((num_blocks, triton.cdiv(intermediate_size, tiles.columns), 1), multiprocessors)
    descriptor = _describe_w1(expert, activation, tiles) if grid.persistent else None
    _first_product_kernel[grid.shape](
        hidden_states, expert.w1, descriptor, expert.b1, out, kept, rows, *blocks, num_blocks if grid.persistent else None,
        hidden_states.shape[1], intermediate_size, top_k,
        *hidden_states.stride(), *expert.w1.stride(), *expert.bias_strides[:2],
        **activation.options, **tiles.options,
    )  # fmt: skip
    return out, kept


def _describe_w1(expert: Expert, activation: Activation, tiles: Tiles) -> TensorDescriptor | None:
    """Return a descriptor of w1, which is not interleaved, as [num_experts, products, intermediate_size, hidden_size]."""
    of_products = expert.w1.unflatten(1, (activation.products, expert.w2.shape[2]))
    return descriptor_of(of_products, (1, 1, tiles.columns, tiles.depth), tiles.rows)


@triton.jit
def _through_activation_kernel(
    hidden_ptr, out_gradient_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, topk_weights_ptr, kept_ptr,
    gradient_ptr, activation_ptr, weight_summands_ptr, bias_summands_ptr, rows_ptr, experts_ptr, starts_ptr, ends_ptr,
    num_rows, hidden_size, intermediate_size, top_k,
    token_stride, hidden_stride, gradient_token_stride, gradient_hidden_stride, w1_expert_stride, w1_row_stride, w1_hidden_stride,
    w2_expert_stride, w2_hidden_stride, w2_column_stride, weights_token_stride, weights_choice_stride,
    b1_expert_stride, b1_row_stride, b2_expert_stride, b2_hidden_stride, alpha, limit,
    NONLINEARITY: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
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
    mask = row_exists & column_exists
    gate_rows, up_rows = rows_of(columns, intermediate_size, GATED, INTERLEAVED)
    width = intermediate_size * (2 if GATED else 1)

    expert = tl.load(experts_ptr + block)
    w1_gate_ptrs = w1_ptr + expert * w1_expert_stride + gate_rows * w1_row_stride
    up_distance = distance_to_up(w1_row_stride, intermediate_size, INTERLEAVED)
    hidden_ptrs = hidden_ptr + tokens * token_stride
    gradient_ptrs = out_gradient_ptr + tokens * gradient_token_stride
    w2_ptrs = w2_ptr + expert * w2_expert_stride + columns * w2_column_stride
    gate = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    up = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    product = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)  # out_gradient @ w2
    through_b2 = tl.full([BLOCK_ROWS], 0.0, tl.float32)  # <out_gradient, b2>
    for first in range(0, hidden_size, BLOCK_DEPTH):
        steps = first + tl.arange(0, BLOCK_DEPTH).to(tl.int64)
        exists = steps < hidden_size
        weight_mask = exists[:, None] & column_exists
        gradient = tl.load(gradient_ptrs + (steps * gradient_hidden_stride)[None, :], mask=exists[None, :], other=0.0)
        w2 = tl.load(w2_ptrs + (steps * w2_hidden_stride)[:, None], mask=weight_mask, other=0.0)
        product = tl.dot(gradient, w2, product, input_precision="ieee")
        if kept_ptr is None:
            w1_ptrs = w1_gate_ptrs + (steps * w1_hidden_stride)[:, None]
            hidden = tl.load(hidden_ptrs + (steps * hidden_stride)[None, :], mask=exists[None, :], other=0.0)
            of_gate = tl.load(w1_ptrs, mask=weight_mask, other=0.0)
            gate = tl.dot(hidden, of_gate, gate, input_precision="ieee")
            if GATED:
                of_up = tl.load(w1_ptrs + up_distance, mask=weight_mask, other=0.0)
                up = tl.dot(hidden, of_up, up, input_precision="ieee")
        if b2_ptr is not None:
            b2 = tl.load(b2_ptr + expert * b2_expert_stride + steps * b2_hidden_stride, mask=exists, other=0.0)
            through_b2 += tl.sum(gradient.to(tl.float32) * b2.to(tl.float32)[None, :], axis=1)

    if kept_ptr is not None:
        kept_ptrs = kept_ptr + positions * width
        gate = tl.load(kept_ptrs + columns, mask=column_exists, other=0.0)
        if GATED:
            up = tl.load(kept_ptrs + intermediate_size + columns, mask=column_exists, other=0.0)
    elif b1_ptr is not None:
        b1_ptr += expert * b1_expert_stride
        gate += tl.load(b1_ptr + gate_rows * b1_row_stride, mask=column_exists, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(b1_ptr + up_rows * b1_row_stride, mask=column_exists, other=0.0).to(tl.float32)

    weight_ptrs = topk_weights_ptr + tokens * weights_token_stride + rows % top_k * weights_choice_stride
    weights = tl.load(weight_ptrs).to(tl.float32)
    slope = weights * product
    activation, gate_gradient, up_gradient = activate_backward(gate, up, slope, alpha, limit, NONLINEARITY, GATED)
    # an infinite token has NaN in columns that do not exist
    partial = tl.sum(tl.where(column_exists, activation * product, 0.0), axis=1)
    partial += tl.where(column_block == 0, through_b2, 0.0)
    tl.store(weight_summands_ptr + column_block * num_rows + rows, partial[:, None], mask=row_exists)
    tl.store(activation_ptr + positions * intermediate_size + columns, weights * activation, mask=mask)
    gradient_ptrs = gradient_ptr + positions * width
    tl.store(gradient_ptrs + gate_rows, gate_gradient, mask=mask)
    if GATED:
        tl.store(gradient_ptrs + up_rows, up_gradient, mask=mask)
    if bias_summands_ptr is not None:
        bias_summands_ptr += block.to(tl.int64) * width
        of_block = tl.sum(tl.where(row_exists, gate_gradient, 0.0), axis=0)[None, :]
        tl.store(bias_summands_ptr + gate_rows, of_block, mask=column_exists)
        if GATED:
            of_block = tl.sum(tl.where(row_exists, up_gradient, 0.0), axis=0)[None, :]
            tl.store(bias_summands_ptr + up_rows, of_block, mask=column_exists)


class Slopes(NamedTuple):
    """What all gradients of experts are made of.

    Attributes:
        pre_activations: [num_rows, products * intermediate_size] by position, their gradients, in the dtype of hidden_states.
        activation: [num_rows, intermediate_size] by position, times topk_weights; same dtype.
        weight_summands: [column blocks, num_rows] by routed row, float32; their sum is a weight's gradient.
        bias_summands: [num_blocks, products * intermediate_size], float32: sums over each block's rows; None without b1. Those of
            empty blocks are left open.
    """

    pre_activations: torch.Tensor
    activation: torch.Tensor
    weight_summands: torch.Tensor
    bias_summands: torch.Tensor | None


def through_activation(
    hidden_states: torch.Tensor,
    out_gradient: torch.Tensor,
    expert: Expert,
    activation: Activation,
    topk_weights: torch.Tensor,
    kept: torch.Tensor | None,
    rows: torch.Tensor,
    blocks: Blocks,
    tiles: Tiles,
) -> Slopes:
    """Compute what all gradients are made of; without `kept`, the pre-activations are computed again."""
    num_rows, (hidden_size, intermediate_size) = rows.shape[0], expert.w2.shape[1:]
    # one block of columns at least: gradients of weights go through b2 too
    grid = (blocks.experts.shape[0], max(1, triton.cdiv(intermediate_size, tiles.columns)))
    gradient = hidden_states.new_empty(num_rows, expert.w1.shape[1])
    weighted = hidden_states.new_empty(num_rows, intermediate_size)
    weight_summands = hidden_states.new_empty(grid[1], num_rows, dtype=torch.float32)
    bias_summands = None
    if expert.b1 is not None:
        bias_summands = hidden_states.new_empty(grid[0], expert.w1.shape[1], dtype=torch.float32)
    _through_activation_kernel[grid](
        hidden_states, out_gradient, expert.w1, expert.b1, expert.w2, expert.b2, topk_weights, kept,
        gradient, weighted, weight_summands, bias_summands, rows, *blocks,
        num_rows, hidden_size, intermediate_size, topk_weights.shape[1],
        *hidden_states.stride(), *out_gradient.stride(), *expert.w1.stride(), *expert.w2.stride(), *topk_weights.stride(),
        *expert.bias_strides, **activation.options, **tiles.options,
    )  # fmt: skip
    return Slopes(gradient, weighted, weight_summands, bias_summands)
