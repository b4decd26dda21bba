"""Routers that balance by softmaxes over tokens.

`soft_moe`: two softmaxes of the same logits, along rows and along columns. Forward, a first kernel goes down the columns, a
block of slots each, for their maxima and sums; a second has whole rows and writes both weights. Backward likewise: columns for
their means, then rows for the gradient. So logits are read three times (the second from a cache, where a sequence's fit), weights
written once and read two and three times. Columns are added up tile by tile in order: the same bits always, and for a
sequence whatever its batch. A batch of one sequence with few slots keeps few processors busy.

`sinkhorn`: the iterations are torch's, two reductions each over all logits; the choice and the weights are one kernel, their
gradient another.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.arithmetic import divide, softmax_of, through_softmax
from gaugeblock.optimized.triton.launch import device_of, program_rows, require_triton_device
from gaugeblock.optimized.triton.routing import empty_choice, launch_rows, load_grads, load_logits, store_choice
from gaugeblock.optimized.triton.topk import choose_lanes, keys_of
from gaugeblock.reference import validation
from gaugeblock.reference.configs import ScoreFunction
from gaugeblock.reference.torch import soft_routers
from gaugeblock.reference.torch.precision import at_least_float32

BLOCK_TOKENS, BLOCK_SLOTS = 32, 32  # a tile of a column kernel: 8 elements a thread of 4 warps
LANES = 1024  # of a row kernel: 8 a thread


@triton.jit
def _tile(first, num_tokens, BLOCK_TOKENS: tl.constexpr):
    rows = first + tl.arange(0, BLOCK_TOKENS)[:, None].to(tl.int64)
    return rows, rows < num_tokens


@triton.jit(do_not_specialize=["num_tokens"])
def _column_sums(
    logits_ptr, highest_ptr, total_ptr, num_tokens, num_slots, batch_stride, row_stride, column_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Find the highest logit of each slot, and the sum of the exponentials of its distances."""
    sequence = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)[None, :]
    exists = slots < num_slots
    dtype = highest_ptr.dtype.element_ty
    logits_ptr += sequence * batch_stride
    highest = tl.full([1, BLOCK_SLOTS], float("-inf"), dtype)
    for first in range(0, num_tokens, BLOCK_TOKENS):
        rows, in_sequence = _tile(first, num_tokens, BLOCK_TOKENS)
        logits = load_logits(logits_ptr, row_stride, column_stride, rows, slots, in_sequence & exists, dtype)
        highest = tl.maximum(highest, tl.max(tl.where(in_sequence, logits, float("-inf")), axis=0)[None, :])
    total = tl.full([1, BLOCK_SLOTS], 0.0, dtype)
    for first in range(0, num_tokens, BLOCK_TOKENS):
        rows, in_sequence = _tile(first, num_tokens, BLOCK_TOKENS)
        logits = load_logits(logits_ptr, row_stride, column_stride, rows, slots, in_sequence & exists, dtype)
        total += tl.sum(tl.where(in_sequence, tl.exp(logits - highest), 0.0), axis=0)[None, :]
    offsets = sequence * num_slots + slots
    tl.store(highest_ptr + offsets, highest, mask=exists)
    tl.store(total_ptr + offsets, total, mask=exists)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _soft_moe_forward(
    logits_ptr, highest_ptr, total_ptr, dispatch_ptr, combine_ptr, num_rows, num_tokens, num_slots,
    batch_stride, row_stride, column_stride, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    rows = program_rows(BLOCK_ROWS)[:, None]
    slots = tl.arange(0, BLOCK_SLOTS)[None, :]
    exists = slots < num_slots
    mask = (rows < num_rows) & exists
    dtype = dispatch_ptr.dtype.element_ty
    sequences = rows // num_tokens
    starts = logits_ptr + sequences * batch_stride
    logits = load_logits(starts, row_stride, column_stride, rows % num_tokens, slots, mask, dtype)
    logits = tl.where(exists, logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    offsets = rows * num_slots + slots
    tl.store(combine_ptr + offsets, divide(exponentials, tl.sum(exponentials, axis=1)[:, None]), mask=mask)

    columns = sequences * num_slots + slots
    highest = tl.load(highest_ptr + columns, mask=mask, other=0.0)
    total = tl.load(total_ptr + columns, mask=mask, other=1.0)
    tl.store(dispatch_ptr + offsets, divide(tl.exp(logits - highest), total), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _column_means(
    dispatch_ptr, grad_ptr, means_ptr, rests_ptr, num_tokens, num_slots, batch_stride, row_stride, column_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Find sum(w * dw) of each slot, and what rounding leaves of it: where a weight is near 1, as large as the gradient."""
    sequence = tl.program_id(0).to(tl.int64)
    slots = tl.program_id(1) * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)[None, :]
    exists = slots < num_slots
    dtype = dispatch_ptr.dtype.element_ty
    dispatch_ptr += sequence * num_tokens * num_slots
    grad_ptr += sequence * batch_stride
    mean = tl.full([1, BLOCK_SLOTS], 0.0, dtype)
    rest = tl.full([1, BLOCK_SLOTS], 0.0, dtype)
    for first in range(0, num_tokens, BLOCK_TOKENS):
        rows, in_sequence = _tile(first, num_tokens, BLOCK_TOKENS)
        weights = tl.load(dispatch_ptr + rows * num_slots + slots, mask=in_sequence & exists, other=0.0)
        mean += tl.sum(
            weights * load_logits(grad_ptr, row_stride, column_stride, rows, slots, in_sequence & exists, dtype), axis=0
        )[None, :]
    for first in range(0, num_tokens, BLOCK_TOKENS):
        rows, in_sequence = _tile(first, num_tokens, BLOCK_TOKENS)
        weights = tl.load(dispatch_ptr + rows * num_slots + slots, mask=in_sequence & exists, other=0.0)
        grads = load_logits(grad_ptr, row_stride, column_stride, rows, slots, in_sequence & exists, dtype)
        rest += tl.sum(weights * (grads - mean), axis=0)[None, :]
    offsets = sequence * num_slots + slots
    tl.store(means_ptr + offsets, mean, mask=exists)
    tl.store(rests_ptr + offsets, rest, mask=exists)


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _soft_moe_backward(
    grad_dispatch_ptr, grad_combine_ptr, dispatch_ptr, combine_ptr, means_ptr, rests_ptr, grad_logits_ptr,
    num_rows, num_tokens, num_slots, dispatch_batch_stride, dispatch_row_stride, dispatch_column_stride,
    combine_batch_stride, combine_row_stride, combine_column_stride, BLOCK_ROWS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients w * (dw - sum(w * dw)) of both softmaxes."""
    rows = program_rows(BLOCK_ROWS)[:, None]
    slots = tl.arange(0, BLOCK_SLOTS)[None, :]
    mask = (rows < num_rows) & (slots < num_slots)
    dtype = dispatch_ptr.dtype.element_ty
    sequences, tokens = rows // num_tokens, rows % num_tokens
    offsets, columns = rows * num_slots + slots, sequences * num_slots + slots
    starts = grad_dispatch_ptr + sequences * dispatch_batch_stride
    grads = load_logits(starts, dispatch_row_stride, dispatch_column_stride, tokens, slots, mask, dtype)
    grads -= tl.load(means_ptr + columns, mask=mask, other=0.0)
    grads -= tl.load(rests_ptr + columns, mask=mask, other=0.0)
    grad_logits = tl.load(dispatch_ptr + offsets, mask=mask, other=0.0) * grads

    weights = tl.load(combine_ptr + offsets, mask=mask, other=0.0)
    starts = grad_combine_ptr + sequences * combine_batch_stride
    grads = load_logits(starts, combine_row_stride, combine_column_stride, tokens, slots, mask, dtype)
    tl.store(grad_logits_ptr + offsets, grad_logits + through_softmax(weights, grads), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_balanced(
    balanced_ptr, logits_ptr, weights_ptr, ids_ptr, num_tokens, balanced_row_stride, balanced_column_stride,
    row_stride, column_stride, num_experts: tl.constexpr, top_k: tl.constexpr, sigmoid: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_TOP_K: tl.constexpr,
):  # fmt: skip
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = weights_ptr.dtype.element_ty
    balanced = load_logits(balanced_ptr, balanced_row_stride, balanced_column_stride, rows, experts, in_batch & exists, dtype)
    ids = choose_lanes(keys_of(balanced, exists), top_k, BLOCK_TOP_K)
    columns = tl.arange(0, BLOCK_TOP_K)[None, :]
    chosen = load_logits(logits_ptr, row_stride, column_stride, rows, ids, in_batch & (columns < top_k), dtype)
    if sigmoid:
        weights = tl.sigmoid(chosen)
    else:
        logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & exists, dtype)
        logits = tl.where(exists, logits, float("-inf"))
        highest = tl.max(logits, axis=1)[:, None]
        weights = divide(tl.exp(chosen - highest), tl.sum(tl.exp(logits - highest), axis=1)[:, None])
    store_choice(weights_ptr, ids_ptr, weights, ids, rows, in_batch, columns, top_k)


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_balanced_backward(
    grad_weights_ptr, ids_ptr, logits_ptr, grad_logits_ptr, num_tokens, grad_row_stride, grad_column_stride,
    row_stride, column_stride, num_experts: tl.constexpr, top_k: tl.constexpr, sigmoid: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = dw * w * (1 - w), or w * (dw - sum(w * dw)); dw is 0 where not chosen."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = grad_weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & exists, dtype)
    _, grads = load_grads(grad_weights_ptr, grad_row_stride, grad_column_stride, ids_ptr, rows, in_batch, experts, top_k)
    if sigmoid:
        grads *= tl.sigmoid(logits) * tl.sigmoid(-logits)  # not 1 - w, which has no digits left where w is near 1
    else:
        grads = through_softmax(softmax_of(tl.where(exists, logits, float("-inf"))), grads)
    tl.store(grad_logits_ptr + rows * num_experts + experts, grads, mask=in_batch & exists)


def _launch_columns(kernel: Any, logits: torch.Tensor, *arguments: Any) -> None:
    """Run `kernel` over blocks of the slots of each sequence of `logits`."""
    batch_size, num_tokens, num_slots = logits.shape
    if batch_size:
        with device_of(logits):
            kernel[(batch_size, triton.cdiv(num_slots, BLOCK_SLOTS))](
                *arguments, num_tokens, num_slots, *logits.stride(), BLOCK_TOKENS=BLOCK_TOKENS, BLOCK_SLOTS=BLOCK_SLOTS
            )


def _launch_all_rows(kernel: Any, logits: torch.Tensor, *arguments: Any, strides: tuple[int, ...]) -> None:
    """Run `kernel` over the rows of all sequences of `logits`."""
    batch_size, num_tokens, num_slots = logits.shape
    num_rows, lanes = batch_size * num_tokens, triton.next_power_of_2(num_slots)
    block_rows = max(1, LANES // lanes)
    if num_rows:
        with device_of(logits):
            kernel[(triton.cdiv(num_rows, block_rows),)](
                *arguments, num_rows, num_tokens, num_slots, *strides,
                BLOCK_ROWS=block_rows, BLOCK_SLOTS=lanes, num_warps=max(4, lanes // 512),
            )  # fmt: skip


class _SoftMoe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch_size, _, num_slots = router_logits.shape
        dtype = torch.promote_types(router_logits.dtype, torch.float32)
        dispatch, combine = (router_logits.new_empty(router_logits.shape, dtype=dtype) for _ in range(2))
        highest, total = (dispatch.new_empty((batch_size, num_slots)) for _ in range(2))
        _launch_columns(_column_sums, router_logits, router_logits, highest, total)
        _launch_all_rows(
            _soft_moe_forward, router_logits, router_logits, highest, total, dispatch, combine, strides=router_logits.stride()
        )
        ctx.save_for_backward(dispatch, combine)
        ctx.dtype = router_logits.dtype
        return dispatch, combine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_dispatch: torch.Tensor, grad_combine: torch.Tensor) -> torch.Tensor:
        dispatch, combine = ctx.saved_tensors
        batch_size, _, num_slots = dispatch.shape
        means, rests = (dispatch.new_empty((batch_size, num_slots)) for _ in range(2))
        grad_logits = torch.empty_like(dispatch, dtype=ctx.dtype)
        _launch_columns(_column_means, grad_dispatch, dispatch, grad_dispatch, means, rests)
        _launch_all_rows(
            _soft_moe_backward, dispatch,
            grad_dispatch, grad_combine, dispatch, combine, means, rests, grad_logits,
            strides=(*grad_dispatch.stride(), *grad_combine.stride()),
        )  # fmt: skip
        return grad_logits


class _ChooseBalanced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, router_logits: torch.Tensor, balanced: torch.Tensor, top_k: int, score_function: ScoreFunction
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = router_logits.shape
        weights, ids = empty_choice(router_logits, top_k)
        block_experts = triton.next_power_of_2(num_experts)
        launch_rows(
            _choose_balanced, router_logits, block_experts,
            balanced, router_logits, weights, ids, num_tokens, *balanced.stride(), *router_logits.stride(),
            num_experts=num_experts, top_k=top_k, sigmoid=score_function == "sigmoid",
            BLOCK_EXPERTS=block_experts, BLOCK_TOP_K=triton.next_power_of_2(top_k),
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, router_logits)
        ctx.score_function = score_function
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        ids, router_logits = ctx.saved_tensors
        num_tokens, num_experts = router_logits.shape
        grad_logits = router_logits.new_empty((num_tokens, num_experts))
        launch_rows(
            _choose_balanced_backward, router_logits, triton.next_power_of_2(num_experts),
            grad_weights, ids, router_logits, grad_logits, num_tokens, *grad_weights.stride(), *router_logits.stride(),
            num_experts=num_experts, top_k=ids.shape[1], sigmoid=ctx.score_function == "sigmoid",
            BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
        )  # fmt: skip
        return grad_logits, None, None, None


def soft_moe(router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how slots are mixed from tokens, and tokens from slots: `reference.torch.soft_routers.soft_moe`, fused.

    Args:
        router_logits: [batch_size, num_tokens, num_slots], any floating dtype, any strides.

    Returns:
        dispatch_weights, combine_weights: [batch_size, num_tokens, num_slots], float32 (float64 for float64 logits);
            differentiable once.

    Raises:
        TypeError: `router_logits` is not a floating array.
        ValueError: `router_logits` is not of rank 3, has no tokens or no slots, or is not where Triton runs.

    Source: From Sparse to Soft Mixtures of Experts (arXiv:2308.00951), section 2.1, equations 1 to 3.
    """
    validation.soft_moe(router_logits)
    require_triton_device("router_logits", router_logits)
    return _SoftMoe.apply(router_logits)


def sinkhorn(
    router_logits: torch.Tensor, *, top_k: int, num_iterations: int, score_function: ScoreFunction
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from a balanced matrix: `reference.torch.soft_routers.sinkhorn`, its choice and weights fused.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides.
        top_k: Experts per token, 1 to num_experts.
        num_iterations: How often rows and columns are divided, by torch; 0 or more.
        score_function: "sigmoid" or "softmax".

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits); differentiable once.
        topk_ids: [num_tokens, top_k], int64, by descending share; NaN highest, of equals the lower id.

    Raises:
        TypeError: `router_logits` is not a floating array, or an option is of another kind.
        ValueError: `router_logits` is not of rank 2 or where Triton runs, `top_k` is not in 1..num_experts, `num_iterations` is
            negative, or `score_function` is not known.

    Source: S-BASE (arXiv:2202.01169); Megatron-LM, `megatron/core/transformer/moe/moe_utils.py`.
    """
    validation.sinkhorn(router_logits, top_k, num_iterations, score_function)
    require_triton_device("router_logits", router_logits)
    balanced = soft_routers.balanced_logits(at_least_float32(router_logits.detach()), num_iterations)
    return _ChooseBalanced.apply(router_logits, balanced, int(top_k), score_function)
