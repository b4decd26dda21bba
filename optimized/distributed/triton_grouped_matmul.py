"""The Triton products of routed rows, as one differentiable function: what expert-parallel experts multiply with on a GPU.

Each of the three products, one forward and two backward, reads its operands in the dtype of the matrices and writes once, in
float32 the rows and in their own dtype the matrices' gradients. Nothing waits for the GPU.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.dispatch import split_into_blocks
from gaugeblock.optimized.triton.grouped_matmul import choose_tiles, rows_times_matrices, sum_of_products
from gaugeblock.optimized.triton.launch import device_of


def grouped_matmul(rows: torch.Tensor, weights: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Multiply the first group of rows by the first matrix, the next group by the next, and so on.

        out[n] = weights[g] @ rows[n],  g = the group that row n lies in

    Args:
        rows: [num_rows, in_features], float32, sorted by group; rounded to the dtype of the weights.
        weights: [num_groups, out_features, in_features], bfloat16, float16 or float32, any strides.
        group_sizes: [num_groups], integer, sums to num_rows.

    Returns:
        [num_rows, out_features], float32.

    Source: `gaugeblock.reference.torch.experts.grouped_matmul`.
    """
    with device_of(rows):
        return _GroupedMatmul.apply(rows, weights, group_sizes)


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
        offsets = torch.nn.functional.pad(group_sizes.cumsum(0), (1, 0))
        operand = rows.to(weights.dtype).contiguous()
        ctx.save_for_backward(operand, weights, offsets)
        return _multiply(operand, weights, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weights, offsets = ctx.saved_tensors
        d_operand = d_out.to(weights.dtype).contiguous()
        d_rows = d_weights = None
        if ctx.needs_input_grad[0]:
            d_rows = _multiply(d_operand, weights.mT, offsets)
        if ctx.needs_input_grad[1]:
            d_weights = weights.new_empty(weights.shape)
            in_place = torch.arange(len(rows), device=rows.device)
            tiles = choose_tiles(d_operand, rows, d_weights)
            sum_of_products(d_operand, rows, d_weights, in_place, offsets, 1, tiles)
        return d_rows, d_weights, None


def _multiply(rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return [num_rows, out_features] float32; rows are contiguous, in the dtype of the weights."""
    tiles = choose_tiles(rows, weights)
    in_place = torch.arange(len(rows), device=rows.device)
    out = rows_times_matrices(rows, weights, in_place, split_into_blocks(offsets, len(rows), tiles.rows), tiles)
    return out[:, 0]  # the sums are in one part
