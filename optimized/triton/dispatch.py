"""Dispatch: routed rows sorted by expert, cut into blocks of one expert each, and summed up for their tokens.

Shapes: T num_tokens, K top_k, N = T * K routed rows, E num_experts, B blocks.

Routed row n is choice n % K of token n // K; its *position* is its place when rows are sorted by expert.
Nothing here waits for the GPU: what depends on the routing stays on the device, and grids are as large as
the worst routing needs. The sum reads each routed row once and writes each token once: it is bound by
memory.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.launch import device_of, program_columns, program_rows, reject_float64, require_triton_device
from gaugeblock.reference import validation

# Of a row that a program moves or adds up at a time: two of each thread of four warps.
COLUMNS = 256


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


def group_by(keys: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Group the elements of an array by key; those of one key stay in their order.

    It is torch's sort, as fast as whoever wrote it for the device; `sorting.py` has kernels that do it by counting.

    Args:
        keys: Any shape, integer, each in 0..num_groups - 1: of routed rows their experts, of places their tokens.
        num_groups: Number of keys.

    Returns:
        order: [number of keys] int64, the element (of the flat array) at each position.
        offsets: [num_groups + 1] int64; key g has the positions from offset g to offset g + 1.
    """
    keys_N, order_N = torch.sort(keys.reshape(-1).to(torch.int64), stable=True)
    # a search, since a bincount waits for the GPU
    return order_N, torch.searchsorted(keys_N, torch.arange(num_groups + 1, device=keys_N.device))


def split_into_blocks(expert_offsets: torch.Tensor, num_rows: int, block_rows: int) -> Blocks:
    """Cut the positions of each expert into blocks of `block_rows`; the last of an expert may be shorter.

    There are as many blocks as the worst routing of `num_rows` needs, so that their number is known without
    the routing: every expert with rows has one block that may be short, and all others are full. Blocks that
    this routing does not need are empty and come last.

    Args:
        expert_offsets: [num_experts + 1] int64, as from `group_by`.
        num_rows: Number of routed rows.
        block_rows: Rows in a full block.
    """
    num_experts = expert_offsets.shape[0] - 1
    num_short = min(num_rows, num_experts)
    blocks_B = torch.arange(num_short + (num_rows - num_short) // block_rows, device=expert_offsets.device)

    num_blocks_E = _needed_blocks(expert_offsets, block_rows)
    last_E = num_blocks_E.cumsum(0)
    # needless blocks count on from the last expert's, so they start behind its end
    experts_B = torch.searchsorted(last_E, blocks_B, right=True).clamp(max=num_experts - 1)
    starts_B = expert_offsets[experts_B] + (blocks_B - (last_E - num_blocks_E)[experts_B]) * block_rows
    expert_ends_B = expert_offsets[experts_B + 1]
    return Blocks(experts_B, starts_B.minimum(expert_ends_B), (starts_B + block_rows).minimum(expert_ends_B))


@triton.jit
def positions_of(block, starts_ptr, ends_ptr, BLOCK_ROWS: tl.constexpr):
    """Return a block's positions, [BLOCK_ROWS, 1], which of them exist, and whether none does.

    Past the end comes the last row again, so that every lane may read; it is not to be stored.
    """
    start = tl.load(starts_ptr + block)
    end = tl.load(ends_ptr + block)
    positions = start + tl.arange(0, BLOCK_ROWS)[:, None]
    return tl.minimum(positions, end - 1), positions < end, start == end


def block_offsets(expert_offsets: torch.Tensor, block_rows: int) -> torch.Tensor:
    """Return where the blocks of each expert begin among those of `split_into_blocks`, [num_experts + 1] int64."""
    return torch.nn.functional.pad(_needed_blocks(expert_offsets, block_rows).cumsum(0), (1, 0))


def _needed_blocks(expert_offsets: torch.Tensor, block_rows: int) -> torch.Tensor:
    return expert_offsets.diff().add(block_rows - 1) // block_rows


@triton.jit
def _sum_rows_kernel(
    rows_ptr, weights_ptr, sums_ptr,
    num_tokens, top_k, width, weights_token_stride, weights_choice_stride,
    PARTS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tokens = program_rows(BLOCK_TOKENS)[:, None]
    columns = program_columns(BLOCK_COLUMNS)
    exists = tokens < num_tokens
    mask = exists & (columns < width)

    row_ptrs = rows_ptr + tokens * top_k * PARTS * width + columns
    weight_ptrs = weights_ptr + tokens * weights_token_stride if weights_ptr is not None else None
    total = tl.full([BLOCK_TOKENS, BLOCK_COLUMNS], 0.0, tl.float32)
    for _ in range(top_k):
        row = tl.load(row_ptrs, mask=mask, other=0.0)
        for _ in tl.static_range(PARTS - 1):
            row_ptrs += width
            row += tl.load(row_ptrs, mask=mask, other=0.0)
        if weights_ptr is not None:
            row *= tl.load(weight_ptrs, mask=exists, other=0.0).to(tl.float32)
            weight_ptrs += weights_choice_stride
        total += row
        row_ptrs += width
    tl.store(sums_ptr + tokens * width + columns, total, mask=mask)


def sum_rows(rows: torch.Tensor, weights: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Add up the rows of each token in the order of its choices, in float32, and round once.

        sums[t] = sum over j of weights[t, j] * (sum over s of rows[t, j, s])

    Args:
        rows: [num_tokens, top_k, parts, width] float32, contiguous.
        weights: [num_tokens, top_k], floating, any strides; None for ones.
        dtype: Of the sums.

    Returns:
        [num_tokens, width].
    """
    num_tokens, top_k, parts, width = rows.shape
    sums = torch.empty(num_tokens, width, dtype=dtype, device=rows.device)
    block_tokens, block_columns = 4, 128
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(width, block_columns))
    _sum_rows_kernel[grid](
        rows, weights, sums,
        num_tokens, top_k, width, *(weights.stride() if weights is not None else (0, 0)),
        PARTS=parts, BLOCK_TOKENS=block_tokens, BLOCK_COLUMNS=block_columns,
    )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    source_ptr, order_ptr, rows_ptr, num_rows, width, top_k, source_row_stride, source_column_stride, order_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """rows[n] = source[order[n] // top_k]."""
    rows = program_rows(BLOCK_ROWS)[:, None]
    columns = program_columns(BLOCK_COLUMNS)
    exists = rows < num_rows
    mask = exists & (columns < width)
    tokens = tl.load(order_ptr + rows * order_stride, mask=exists, other=0).to(tl.int64) // top_k
    values = tl.load(source_ptr + tokens * source_row_stride + columns * source_column_stride, mask=mask, other=0.0)
    tl.store(rows_ptr + rows * width + columns, values, mask=mask)


@triton.jit
def _sum_listed_kernel(
    source_ptr, entries_ptr, places_ptr, weights_ptr, starts_ptr, sums_ptr, width, top_k,
    source_row_stride, source_column_stride, places_token_stride, places_choice_stride,
    weights_token_stride, weights_choice_stride, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """sums[r] = sum over i from starts[r] to starts[r + 1] of weights[n] * source[places[n]], n = entries[i].

    Without entries n is i, without places the row is that of the token, without weights they are 1.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = columns < width
    source_ptr += columns * source_column_stride
    total = tl.full([BLOCK_COLUMNS], 0.0, tl.float32)
    for i in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        entry = tl.load(entries_ptr + i) if entries_ptr is not None else i
        token, choice = entry // top_k, entry % top_k
        place = token
        if places_ptr is not None:
            place = tl.load(places_ptr + token * places_token_stride + choice * places_choice_stride).to(tl.int64)
        value = tl.load(source_ptr + place * source_row_stride, mask=exists, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            value *= tl.load(weights_ptr + token * weights_token_stride + choice * weights_choice_stride).to(tl.float32)
        total += value
    tl.store(sums_ptr + row * width + columns, total, mask=exists)


@triton.jit
def _dot_listed_kernel(
    left_ptr, right_ptr, places_ptr, dots_ptr, width, top_k, left_row_stride, left_column_stride,
    right_row_stride, right_column_stride, places_token_stride, places_choice_stride, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dots[n] = <left[places[n]], right[n // top_k]>."""
    row = tl.program_id(0).to(tl.int64)
    token = row // top_k
    place = tl.load(places_ptr + token * places_token_stride + row % top_k * places_choice_stride).to(tl.int64)
    left_ptr += place * left_row_stride
    right_ptr += token * right_row_stride
    total = tl.full([BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        columns = first + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        left = tl.load(left_ptr + columns * left_column_stride, mask=columns < width, other=0.0).to(tl.float32)
        right = tl.load(right_ptr + columns * right_column_stride, mask=columns < width, other=0.0).to(tl.float32)
        total += left * right
    tl.store(dots_ptr + row, tl.sum(total))


def _gather(source: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return source[order // top_k], [num_rows, width]."""
    num_rows, width = order.shape[0], source.shape[1]
    rows = source.new_empty(num_rows, width)
    block_rows = 4
    grid = (triton.cdiv(num_rows, block_rows), triton.cdiv(width, COLUMNS))
    if rows.numel():
        _gather_kernel[grid](
            source, order, rows, num_rows, width, top_k, *source.stride(), order.stride(0),
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=COLUMNS,
        )  # fmt: skip
    return rows


def sum_listed(
    source: torch.Tensor,
    starts: torch.Tensor,
    *,
    top_k: int,
    entries: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add up rows of `source` in float32, each sum those of the entries from its start to the next one's, and round once.

    Args:
        source: [any, width], floating.
        starts: [num_sums + 1] int64, ascending.
        top_k: Entries of a token.
        entries: [num_entries] int64, contiguous; None for all in their order.
        places: [num_tokens, top_k], integer, the row of each entry; None for that of its token.
        weights: [num_tokens, top_k], floating; None for ones.

    Returns:
        [num_sums, width], dtype of source.
    """
    num_sums, width = starts.shape[0] - 1, source.shape[1]
    sums = source.new_empty(num_sums, width)
    strides = [stride for each in (places, weights) for stride in ((0, 0) if each is None else each.stride())]
    if sums.numel():
        _sum_listed_kernel[(num_sums, triton.cdiv(width, COLUMNS))](
            source, entries, places, weights, starts, sums, width, top_k, *source.stride(), *strides, BLOCK_COLUMNS=COLUMNS
        )  # fmt: skip
    return sums


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, order: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.num_tokens, ctx.top_k = hidden_states.shape[0], top_k
        ctx.save_for_backward(order)
        return _gather(hidden_states, order, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        with device_of(grad):
            places, starts = group_by(order // ctx.top_k, ctx.num_tokens)
            return sum_listed(grad, starts, top_k=1, entries=places), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, inverse: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, inverse, topk_weights)
        num_tokens, top_k = inverse.shape
        starts = torch.arange(num_tokens + 1, device=rows.device) * top_k
        return sum_listed(rows, starts, top_k=top_k, places=inverse, weights=topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inverse, topk_weights = ctx.saved_tensors
        (num_rows, width), top_k = rows.shape, inverse.shape[1]
        rows_gradient = weights_gradient = None
        with device_of(rows):
            if ctx.needs_input_grad[0]:
                entries, starts = group_by(inverse, num_rows)
                rows_gradient = sum_listed(grad, starts, top_k=top_k, entries=entries, weights=topk_weights)
            if ctx.needs_input_grad[2]:
                weights_gradient = topk_weights.new_empty(inverse.shape)
                if inverse.numel():
                    _dot_listed_kernel[(inverse.numel(),)](
                        rows, grad, inverse, weights_gradient, width, top_k,
                        *rows.stride(), *grad.stride(), *inverse.stride(), BLOCK_COLUMNS=COLUMNS,
                    )  # fmt: skip
        return rows_gradient, None, weights_gradient


def permute(hidden_states: torch.Tensor, order: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """Gather the token of each place: `reference.torch.dispatch.permute`.

    Backward sorts the places by token and adds up each token's, in float32, so that nothing is added by atomics. Any strides
    will do. Differentiable once, in hidden_states.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        order: [num_rows], integer in 0..num_tokens * top_k - 1.
        top_k: Choices of a token.

    Returns:
        [num_rows, hidden_size], dtype of hidden_states.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or `top_k` is no integer.
        ValueError: Ranks, sizes or devices do not fit together, `order` names no routed row, or Triton cannot run on the
            device.

    Source: `gaugeblock.reference.torch.dispatch.permute`.
    """
    validation.permute(hidden_states, order, top_k)
    reject_float64("hidden_states", hidden_states)
    validation.routed_rows_in_range(order, num_rows=hidden_states.shape[0] * top_k)
    require_triton_device("hidden_states", hidden_states)
    with device_of(hidden_states):
        return _Permute.apply(hidden_states, order, top_k)


def unpermute(rows: torch.Tensor, inverse: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Add up the rows of each token, weighted: `reference.torch.dispatch.unpermute`.

    Sums are those of float32, in the order of a token's choices, and rounded once. Backward sorts the routed rows by place.
    Any strides will do. Differentiable once, in rows and topk_weights.

    Args:
        rows: [num_rows, hidden_size], bfloat16, float16 or float32.
        inverse: [num_tokens, top_k], integer in 0..num_rows - 1.
        topk_weights: [num_tokens, top_k], bfloat16, float16 or float32.

    Returns:
        [num_tokens, hidden_size], dtype of rows.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, `inverse` names no row, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.dispatch.unpermute`.
    """
    validation.unpermute(rows, inverse, topk_weights)
    for name, tensor in (("rows", rows), ("topk_weights", topk_weights)):
        reject_float64(name, tensor)
    validation.places_in_range(inverse, num_rows=rows.shape[0])
    require_triton_device("rows", rows)
    with device_of(rows):
        return _Unpermute.apply(rows, inverse, topk_weights)
