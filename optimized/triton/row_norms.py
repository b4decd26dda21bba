"""RMSNorm and LayerNorm of rows, in one kernel forward and two backward; rows of more than 8192 columns take one more of each.

    out = (x - mean) * rstd * weight + bias            LayerNorm, if there is a bias
    out = x * rstd * weight                            RMSNorm

All kernels are bound by memory. A row lies in the registers of its program: forward reads it once and writes it once, backward
reads row and gradient once and writes the gradient of the row once. Kept from forward, where a gradient is wanted, are rstd and
mean, 4 or 8 bytes a row. Wider rows have their statistics computed by a kernel of its own, and are read once more.

Gradients of weight and bias are sums over all rows. Backward's grid is as large as the chip takes at a time; each of its programs
goes through blocks of rows by stride and keeps their sum in registers, and `partial_sums` adds up what the programs write: two
writes of `width` floats for each multiprocessor, and no atomics. The order of that sum depends on the number of rows and on the
chip, nothing else does.

Rows are addressed by the strides of up to three leading axes, so that the heads of an attention, views into a tensor of queries,
keys and values, are normalized where they lie.

Shapes: R rows, D width.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.launch import device_of, multiprocessors_of, reject_float64, require_triton_device
from gaugeblock.optimized.triton.partial_sums import sum_chunks

# A thread has 16 elements of each of its tensors: two loads of 16 bytes in 16-bit dtypes; backward holds five such tiles in
# registers. Up to this width a program of 16 warps has a whole row.
ELEMENTS_PER_WARP = 16 * 32
FEWEST_ELEMENTS = 4 * ELEMENTS_PER_WARP
WIDEST = 16 * ELEMENTS_PER_WARP
# Backward, for each multiprocessor: with 2 loads of 16 elements a lane some 32 KiB are under way.
WARPS_PER_MULTIPROCESSOR = 16
LEADING_AXES = 3


@triton.jit
def _offsets(rows, size_1, size_2, stride_0, stride_1, stride_2):
    """Return where the rows begin, int64, of rows that are counted over three axes."""
    pairs = rows // size_2  # of 32 bits: a GPU has no division of 64
    first = pairs // size_1
    of_first = first.to(tl.int64) * stride_0
    return of_first + (pairs - first * size_1).to(tl.int64) * stride_1 + (rows - pairs * size_2).to(tl.int64) * stride_2


@triton.jit
def _load(pointers, mask):
    """Return float32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _statistics_kernel(
    inputs_ptr, means_ptr, rstds_ptr, width, eps, size_1, size_2, stride_0, stride_1, stride_2, column_stride,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one row."""
    row = tl.program_id(0) + tl.arange(0, 1)[:, None]
    inputs_ptr += _offsets(row, size_1, size_2, stride_0, stride_1, stride_2)
    lanes = tl.arange(0, BLOCK_COLUMNS)[None, :].to(tl.int64)
    mean = tl.full([1, 1], 0.0, tl.float32)
    if means_ptr is not None:
        total = tl.full([1, BLOCK_COLUMNS], 0.0, tl.float32)
        for first in range(0, width, BLOCK_COLUMNS):
            total += _load(inputs_ptr + (first + lanes) * column_stride, first + lanes < width)
        mean = tl.sum(total, axis=1)[:, None] / width
        tl.store(means_ptr + row, mean)
    squares = tl.full([1, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        mask = first + lanes < width
        # two passes: one pass loses (mean / deviation)^2 digits
        centred = tl.where(mask, _load(inputs_ptr + (first + lanes) * column_stride, mask) - mean, 0.0)
        squares += centred * centred
    tl.store(rstds_ptr + row, tl.rsqrt(tl.sum(squares, axis=1)[:, None] / width + eps))


@triton.jit
def _forward_kernel(
    inputs_ptr, weight_ptr, bias_ptr, outputs_ptr, means_ptr, rstds_ptr,
    num_rows, width, eps, weight_stride, bias_stride,
    size_1, size_2, stride_0, stride_1, stride_2, column_stride,
    WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Normalize whole rows and keep their statistics, or columns of rows that have statistics."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]).to(tl.int64)
    row_exists = rows < num_rows
    exists = columns < width
    mask = row_exists & exists
    inputs = _load(inputs_ptr + _offsets(rows, size_1, size_2, stride_0, stride_1, stride_2) + columns * column_stride, mask)
    if WHOLE:
        centred = inputs
        if bias_ptr is not None:
            mean = tl.sum(inputs, axis=1)[:, None] / width
            centred = tl.where(mask, inputs - mean, 0.0)
            if means_ptr is not None:
                tl.store(means_ptr + rows, mean, mask=row_exists)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / width + eps)
        if rstds_ptr is not None:
            tl.store(rstds_ptr + rows, rstd, mask=row_exists)
    else:
        centred = inputs
        if bias_ptr is not None:
            centred -= _load(means_ptr + rows, row_exists)
        rstd = _load(rstds_ptr + rows, row_exists)
    outputs = centred * rstd * _load(weight_ptr + columns * weight_stride, exists)
    if bias_ptr is not None:
        outputs += _load(bias_ptr + columns * bias_stride, exists)
    tl.store(outputs_ptr + rows.to(tl.int64) * width + columns, outputs, mask=mask)


@triton.jit
def _load_pair(
    inputs_ptrs, means_ptr, rstds_ptr, gradients_ptrs, rows, columns, column_stride, gradient_column_stride,
    row_exists, mask,
):  # fmt: skip
    """Return normalized rows, 0 where masked, the reciprocals of their deviations, and the gradients of the results."""
    normalized = _load(inputs_ptrs + columns * column_stride, mask)
    if means_ptr is not None:
        normalized = tl.where(mask, normalized - _load(means_ptr + rows, row_exists), 0.0)
    rstd = _load(rstds_ptr + rows, row_exists)
    return normalized * rstd, rstd, _load(gradients_ptrs + columns * gradient_column_stride, mask)


@triton.jit
def _row_sums_kernel(
    inputs_ptr, weight_ptr, means_ptr, rstds_ptr, gradients_ptr, row_sums_ptr, num_rows, width, weight_stride,
    size_1, size_2, stride_0, stride_1, stride_2, column_stride,
    gradient_stride_0, gradient_stride_1, gradient_stride_2, gradient_column_stride,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of one row: what `_backward_kernel` subtracts, in [3, R]."""
    row = tl.program_id(0) + tl.arange(0, 1)[:, None]
    inputs_ptr += _offsets(row, size_1, size_2, stride_0, stride_1, stride_2)
    gradients_ptr += _offsets(row, size_1, size_2, gradient_stride_0, gradient_stride_1, gradient_stride_2)
    lanes = tl.arange(0, BLOCK_COLUMNS)[None, :].to(tl.int64)
    products = tl.full([1, BLOCK_COLUMNS], 0.0, tl.float32)
    gradient_sum = tl.full([1, BLOCK_COLUMNS], 0.0, tl.float32)
    normalized_sum = tl.full([1, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        columns = first + lanes
        exists = columns < width
        normalized, _, gradient = _load_pair(
            inputs_ptr, means_ptr, rstds_ptr, gradients_ptr, row, columns, column_stride, gradient_column_stride,
            row < num_rows, exists,
        )  # fmt: skip
        gradient *= _load(weight_ptr + columns * weight_stride, exists)
        products += gradient * normalized
        if means_ptr is not None:
            gradient_sum += gradient
            normalized_sum += normalized
    row_sums_ptr += row
    tl.store(row_sums_ptr, tl.sum(products, axis=1)[:, None])
    if means_ptr is not None:
        tl.store(row_sums_ptr + num_rows, tl.sum(gradient_sum, axis=1)[:, None])
        tl.store(row_sums_ptr + 2 * num_rows, tl.sum(normalized_sum, axis=1)[:, None])


@triton.jit
def _backward_kernel(
    inputs_ptr, weight_ptr, means_ptr, rstds_ptr, gradients_ptr, row_sums_ptr,
    input_gradients_ptr, weight_sums_ptr, bias_sums_ptr, num_rows, width, weight_stride,
    size_1, size_2, stride_0, stride_1, stride_2, column_stride,
    gradient_stride_0, gradient_stride_1, gradient_stride_2, gradient_column_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """With n = (x - mean) * rstd and dn = dout * weight: dx = rstd * (dn - mean(dn) - z * mean(dn * z)).

    z is n less its own mean: a rounded mean leaves some, up to (mean / sigma) units, and a gradient may be smaller than that.
    RMSNorm has no means: dx = rstd * (dn - n * mean(dn * n)).
    """
    columns = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]).to(tl.int64)
    exists = columns < width
    weight = _load(weight_ptr + columns * weight_stride, exists)
    weight_sum = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    bias_sum = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_ROWS), tl.num_programs(0)):
        rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        row_exists = rows < num_rows
        mask = row_exists & exists
        normalized, rstd, gradient = _load_pair(
            inputs_ptr + _offsets(rows, size_1, size_2, stride_0, stride_1, stride_2), means_ptr, rstds_ptr,
            gradients_ptr + _offsets(rows, size_1, size_2, gradient_stride_0, gradient_stride_1, gradient_stride_2),
            rows, columns, column_stride, gradient_column_stride, row_exists, mask,
        )  # fmt: skip
        weight_sum += gradient * normalized
        if bias_sums_ptr is not None:
            bias_sum += gradient
        if input_gradients_ptr is not None:
            gradient *= weight
            if row_sums_ptr is None:
                projection = tl.sum(gradient * normalized, axis=1)[:, None] / width
            else:
                projection = _load(row_sums_ptr + rows, row_exists) / width
            if means_ptr is not None:
                if row_sums_ptr is None:
                    mean_gradient = tl.sum(gradient, axis=1)[:, None] / width
                    mean_normalized = tl.sum(normalized, axis=1)[:, None] / width
                else:
                    mean_gradient = _load(row_sums_ptr + num_rows + rows, row_exists) / width
                    mean_normalized = _load(row_sums_ptr + 2 * num_rows + rows, row_exists) / width
                projection -= mean_gradient * mean_normalized
                gradient -= mean_gradient
                normalized -= mean_normalized
            out = rstd * (gradient - normalized * projection)
            tl.store(input_gradients_ptr + rows.to(tl.int64) * width + columns, out, mask=mask)
    sums = tl.program_id(0).to(tl.int64) * width + columns
    if weight_sums_ptr is not None:
        tl.store(weight_sums_ptr + sums, tl.sum(weight_sum, axis=0)[None, :], mask=exists)
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + sums, tl.sum(bias_sum, axis=0)[None, :], mask=exists)


def _blocks(width: int) -> tuple[int, int, int]:
    """Return rows and columns of a block, and its warps: whole rows up to the widest, and as many as fill four warps."""
    columns = min(triton.next_power_of_2(max(1, width)), WIDEST)
    rows = max(1, FEWEST_ELEMENTS // columns)
    return rows, columns, rows * columns // ELEMENTS_PER_WARP


class _Rows(NamedTuple):
    """Tensors of one shape as rows, of three leading axes."""

    tensors: tuple[torch.Tensor, ...]
    sizes: tuple[int, int]
    """Of the second and third axis."""
    strides: tuple[tuple[int, ...], ...]
    """Of each tensor: along the three axes, and from column to column."""


def _rows_of(*tensors: torch.Tensor) -> _Rows:
    """Merge leading axes where all tensors allow it; what has more than three left, which no model has, is copied."""
    axes: list[tuple[int, list[int]]] = []
    for size, *strides in zip(tensors[0].shape[:-1], *(tensor.stride() for tensor in tensors), strict=False):
        if axes and all(outer == size * inner for outer, inner in zip(axes[-1][1], strides, strict=True)):
            axes[-1] = (axes[-1][0] * size, strides)
        elif size != 1:
            axes.append((size, strides))
    if len(axes) > LEADING_AXES:
        return _rows_of(*(tensor.contiguous() for tensor in tensors))
    axes += [(1, [0] * len(tensors))] * (LEADING_AXES - len(axes))
    of_each = tuple((*(strides[place] for _, strides in axes), each.stride(-1)) for place, each in enumerate(tensors))
    return _Rows(tensors, (axes[1][0], axes[2][0]), of_each)


class _NormOfRows(torch.autograd.Function):
    """LayerNorm; without a bias, RMSNorm."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        width, num_rows = inputs.shape[-1], inputs.shape[:-1].numel()
        block_rows, block_columns, num_warps = _blocks(width)
        whole = width <= block_columns
        outputs = inputs.new_empty(inputs.shape)
        rstds = inputs.new_empty(num_rows, dtype=torch.float32) if any(ctx.needs_input_grad) or not whole else None
        means = torch.empty_like(rstds) if rstds is not None and bias is not None else None
        (addressed,), sizes, (strides,) = _rows_of(inputs)
        if not whole:
            _statistics_kernel[(num_rows,)](
                addressed, means, rstds, width, eps, *sizes, *strides, BLOCK_COLUMNS=block_columns, num_warps=num_warps
            )
        _forward_kernel[(triton.cdiv(num_rows, block_rows), triton.cdiv(width, block_columns))](
            addressed, weight, bias, outputs, means, rstds,
            num_rows, width, eps, weight.stride(0), 0 if bias is None else bias.stride(0), *sizes, *strides,
            WHOLE=whole, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=num_warps,
        )  # fmt: skip
        ctx.save_for_backward(inputs, weight, means, rstds)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight, means, rstds = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias, _ = ctx.needs_input_grad
        width, num_rows = inputs.shape[-1], inputs.shape[:-1].numel()
        block_rows, block_columns, num_warps = _blocks(width)
        column_blocks = triton.cdiv(width, block_columns)
        most = max(1, multiprocessors_of(inputs) * WARPS_PER_MULTIPROCESSOR // (num_warps * max(1, column_blocks)))
        programs = min(triton.cdiv(num_rows, block_rows), most)

        (addressed, of_outputs), sizes, strides = _rows_of(inputs, gradient)
        arguments = num_rows, width, weight.stride(0), *sizes, *strides[0], *strides[1]
        row_sums = None
        if needs_inputs and column_blocks > 1:
            row_sums = rstds.new_empty(3, num_rows)
            _row_sums_kernel[(num_rows,)](
                addressed, weight, means, rstds, of_outputs, row_sums, *arguments,
                BLOCK_COLUMNS=block_columns, num_warps=num_warps,
            )  # fmt: skip
        input_gradient = inputs.new_empty(inputs.shape) if needs_inputs else None
        wanted = needs_weight, needs_bias
        chunks = inputs.new_empty(sum(wanted), programs, width, dtype=torch.float32)
        each = iter(chunks)
        _backward_kernel[(programs, column_blocks)](
            addressed, weight, means, rstds, of_outputs, row_sums,
            input_gradient, *(next(each) if needed else None for needed in wanted), *arguments,
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=num_warps,
        )  # fmt: skip
        each = iter(sum_chunks(chunks, weight.dtype) if any(wanted) else ())
        return input_gradient, *(next(each) if needed else None for needed in wanted), None


def norm_of_rows(name: str, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalize the last axis of `inputs`, [..., width], which errors call by a name; without a bias, RMSNorm."""
    reject_float64(name, inputs)
    require_triton_device(name, inputs)
    with device_of(inputs):
        return _NormOfRows.apply(inputs, weight, bias, eps)
