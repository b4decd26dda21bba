"""Losses that keep the load of experts even.

A loss reads the logits once: each program adds up its tokens in registers and writes its sums, of each expert
for the load-balancing loss; one more program adds those up. Tokens belong to programs by their place alone and
nothing is added by atomics, so that every run gives the same bits. Backward reads the logits again and writes
their gradient, once each. All is bound by memory, or by the launches where tokens are few.

Padding is never read, neither its logits nor its ids. Any strides will do.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.arithmetic import divide
from gaugeblock.optimized.triton.launch import device_of, program_rows, require_triton_device
from gaugeblock.reference import validation

# Programs that write sums: a few for each of a GPU's processors.
MOST_PROGRAMS = 512
# Logits that a program has in registers: eight per thread of four warps. More make its sums spill.
TILE = 1024
# Sums that the last program has in registers: 32 per thread of eight warps.
LAST_TILE = 8192


@triton.jit
def _is_counted(mask_ptr, mask_stride, rows, num_tokens):
    in_batch = rows < num_tokens
    return in_batch & tl.load(mask_ptr + rows * mask_stride, mask=in_batch, other=0).to(tl.int1)


@triton.jit
def _load_logits(logits_ptr, row_stride, column_stride, rows, is_counted, experts, exists, dtype: tl.constexpr):
    """Return logits[rows, experts] in a compute dtype, -inf where there is no expert, 0 where a token does not count."""
    offsets = rows * row_stride + experts.to(tl.int64) * column_stride
    logits = tl.load(logits_ptr + offsets, mask=is_counted & exists, other=0.0).to(dtype)
    return tl.where(exists, logits, float("-inf"))


@triton.jit
def _exponentials(logits):
    """Return exp(logits - highest), their sum, and the highest of each row."""
    highest = tl.max(logits, axis=1)[:, None]
    exponentials = tl.exp(logits - highest)
    return exponentials, tl.sum(exponentials, axis=1)[:, None], highest


@triton.jit(do_not_specialize=["num_tokens"])
def _balance_sums(
    logits_ptr, ids_ptr, mask_ptr, probabilities_ptr, assignments_ptr,
    num_tokens, row_stride, column_stride, ids_row_stride, ids_column_stride, mask_stride,
    num_experts: tl.constexpr, top_k: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Add up, for each expert, the probabilities and the assignments of this program's tokens."""
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = probabilities_ptr.dtype.element_ty
    probabilities = tl.full([BLOCK_TOKENS, BLOCK_EXPERTS], 0.0, dtype)
    assignments = tl.full([BLOCK_TOKENS, BLOCK_EXPERTS], 0, tl.int32)
    for first in range(0, num_tokens, tl.num_programs(0) * BLOCK_TOKENS):
        rows = first + program_rows(BLOCK_TOKENS)[:, None]
        is_counted = _is_counted(mask_ptr, mask_stride, rows, num_tokens)
        logits = _load_logits(logits_ptr, row_stride, column_stride, rows, is_counted, experts, exists, dtype)
        exponentials, total, _ = _exponentials(logits)
        probabilities += tl.where(is_counted, divide(exponentials, total), 0.0)
        chosen_ptr = ids_ptr + rows * ids_row_stride
        for _ in range(top_k):
            ids = tl.load(chosen_ptr, mask=is_counted, other=0)
            assignments += (is_counted & (ids.to(tl.int32) == experts)).to(tl.int32)
            chosen_ptr += ids_column_stride  # step by step: a column times its stride may pass 2^31
    offsets = tl.program_id(0) * num_experts + tl.arange(0, BLOCK_EXPERTS)
    mask = tl.arange(0, BLOCK_EXPERTS) < num_experts
    tl.store(probabilities_ptr + offsets, tl.sum(probabilities, axis=0), mask=mask)
    tl.store(assignments_ptr + offsets, tl.sum(assignments, axis=0), mask=mask)


@triton.jit
def _balance_loss(
    probabilities_ptr, assignments_ptr, loss_ptr, slopes_ptr, num_programs,
    num_experts: tl.constexpr, top_k: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Add up the sums of all programs; the slope of an expert is the derivative of the loss by its probabilities."""
    experts = tl.arange(0, BLOCK_EXPERTS)
    dtype = probabilities_ptr.dtype.element_ty
    probabilities = tl.full([BLOCK_EXPERTS], 0.0, dtype)
    assignments = tl.full([BLOCK_EXPERTS], 0, tl.int64)
    for first in range(0, num_programs, BLOCK_PROGRAMS):
        programs = first + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        offsets = programs * num_experts + experts[None, :]
        mask = (programs < num_programs) & (experts < num_experts)[None, :]
        probabilities += tl.sum(tl.load(probabilities_ptr + offsets, mask=mask, other=0.0), axis=0)
        assignments += tl.sum(tl.load(assignments_ptr + offsets, mask=mask, other=0).to(tl.int64), axis=0)
    num_unmasked = tl.maximum(tl.sum(assignments) // top_k, 1).to(dtype)
    shares = divide(assignments.to(dtype), num_unmasked * top_k)
    slopes = num_experts * divide(shares, num_unmasked)
    tl.store(slopes_ptr + experts, slopes, mask=experts < num_experts)
    tl.store(loss_ptr, tl.sum(slopes * probabilities))


@triton.jit(do_not_specialize=["num_tokens"])
def _balance_backward(
    logits_ptr, mask_ptr, slopes_ptr, grad_ptr, grad_logits_ptr,
    num_tokens, row_stride, column_stride, mask_stride,
    num_experts: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = p * (dp - sum(p * dp)), dp being the slopes."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = slopes_ptr.dtype.element_ty
    is_counted = _is_counted(mask_ptr, mask_stride, rows, num_tokens)
    logits = _load_logits(logits_ptr, row_stride, column_stride, rows, is_counted, experts, exists, dtype)
    exponentials, total, _ = _exponentials(logits)
    probabilities = divide(exponentials, total)
    slopes = tl.load(slopes_ptr + experts, mask=exists, other=0.0)
    # centered twice: where a probability is near 1, what rounding leaves of the mean is as large as the gradient
    for _ in tl.static_range(2):
        slopes -= tl.sum(probabilities * slopes, axis=1)[:, None]
    grads = tl.where(is_counted, tl.load(grad_ptr) * probabilities * slopes, 0.0)
    tl.store(grad_logits_ptr + rows * num_experts + experts, grads, mask=(rows < num_tokens) & exists)


@triton.jit(do_not_specialize=["num_tokens"])
def _z_sums(
    logits_ptr, mask_ptr, squares_ptr, counts_ptr, num_tokens, row_stride, column_stride, mask_stride,
    num_experts: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Add up the squares of this program's logsumexp, and its tokens."""
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = squares_ptr.dtype.element_ty
    squares = tl.full([BLOCK_TOKENS, 1], 0.0, dtype)
    counts = tl.full([BLOCK_TOKENS, 1], 0, tl.int32)
    for first in range(0, num_tokens, tl.num_programs(0) * BLOCK_TOKENS):
        rows = first + program_rows(BLOCK_TOKENS)[:, None]
        is_counted = _is_counted(mask_ptr, mask_stride, rows, num_tokens)
        logits = _load_logits(logits_ptr, row_stride, column_stride, rows, is_counted, experts, exists, dtype)
        _, total, highest = _exponentials(logits)
        z = highest + tl.log(total)
        squares += tl.where(is_counted, z * z, 0.0)
        counts += is_counted.to(tl.int32)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(squares))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(counts))


@triton.jit
def _z_loss(squares_ptr, counts_ptr, loss_ptr, slope_ptr, num_programs, BLOCK_PROGRAMS: tl.constexpr):
    """Add up the sums of all programs; the slope is the derivative of the loss by a square."""
    programs = tl.arange(0, BLOCK_PROGRAMS)
    mask = programs < num_programs
    squares = tl.sum(tl.load(squares_ptr + programs, mask=mask, other=0.0), axis=0, keep_dims=True)
    counts = tl.sum(tl.load(counts_ptr + programs, mask=mask, other=0).to(tl.int64), axis=0, keep_dims=True)
    num_unmasked = tl.maximum(counts, 1).to(squares.dtype)
    first = tl.arange(0, 1)
    tl.store(loss_ptr + first, divide(squares, num_unmasked))
    tl.store(slope_ptr + first, 1.0 / num_unmasked)


@triton.jit(do_not_specialize=["num_tokens"])
def _z_backward(
    logits_ptr, mask_ptr, slope_ptr, grad_ptr, grad_logits_ptr,
    num_tokens, row_stride, column_stride, mask_stride,
    num_experts: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = 2 * z * p * slope."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = slope_ptr.dtype.element_ty
    is_counted = _is_counted(mask_ptr, mask_stride, rows, num_tokens)
    logits = _load_logits(logits_ptr, row_stride, column_stride, rows, is_counted, experts, exists, dtype)
    exponentials, total, highest = _exponentials(logits)
    z = highest + tl.log(total)
    grads = tl.load(grad_ptr) * tl.load(slope_ptr) * 2.0 * z * divide(exponentials, total)
    tl.store(grad_logits_ptr + rows * num_experts + experts, tl.where(is_counted, grads, 0.0), mask=(rows < num_tokens) & exists)


def _blocks(router_logits: torch.Tensor) -> tuple[int, dict[str, int]]:
    """Return the blocks of tokens that there are, and the constants of a kernel that works on them."""
    num_tokens, num_experts = router_logits.shape
    lanes = triton.next_power_of_2(num_experts)
    block_tokens = max(1, TILE // lanes)
    constants = {"num_experts": num_experts, "BLOCK_TOKENS": block_tokens, "BLOCK_EXPERTS": lanes}
    return triton.cdiv(num_tokens, block_tokens), constants


def _grad_logits(kernel: Any, ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    """Run a backward kernel, which reads what its forward saved."""
    router_logits, attention_mask, slopes = ctx.saved_tensors
    grad_logits = router_logits.new_empty(router_logits.shape)
    num_blocks, constants = _blocks(router_logits)
    if num_blocks:
        with device_of(router_logits):
            kernel[(num_blocks,)](
                router_logits, attention_mask, slopes, grad, grad_logits,
                router_logits.shape[0], *router_logits.stride(), attention_mask.stride(0), **constants,
            )  # fmt: skip
    return grad_logits


class _LoadBalancingLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        (num_tokens, num_experts), top_k = router_logits.shape, topk_ids.shape[1]
        num_blocks, constants = _blocks(router_logits)
        num_programs = min(num_blocks, MOST_PROGRAMS)
        dtype = torch.promote_types(router_logits.dtype, torch.float32)
        probabilities = router_logits.new_empty((num_programs, num_experts), dtype=dtype)
        assignments = torch.empty_like(probabilities, dtype=torch.int32)
        loss, slopes = probabilities.new_empty(()), probabilities.new_empty(num_experts)
        with device_of(router_logits):
            if num_programs:
                _balance_sums[(num_programs,)](
                    router_logits, topk_ids, attention_mask, probabilities, assignments,
                    num_tokens, *router_logits.stride(), *topk_ids.stride(), attention_mask.stride(0),
                    top_k=top_k, **constants,
                )  # fmt: skip
            _balance_loss[(1,)](
                probabilities, assignments, loss, slopes, num_programs,
                num_experts=num_experts, top_k=top_k, BLOCK_EXPERTS=constants["BLOCK_EXPERTS"],
                BLOCK_PROGRAMS=max(1, LAST_TILE // constants["BLOCK_EXPERTS"]), num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(router_logits, attention_mask, slopes)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _grad_logits(_balance_backward, ctx, grad), None, None


class _RouterZLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        num_blocks, constants = _blocks(router_logits)
        num_programs = min(num_blocks, MOST_PROGRAMS)
        dtype = torch.promote_types(router_logits.dtype, torch.float32)
        squares = router_logits.new_empty(num_programs, dtype=dtype)
        counts = torch.empty_like(squares, dtype=torch.int32)
        loss, slope = squares.new_empty(()), squares.new_empty(())
        with device_of(router_logits):
            if num_programs:
                _z_sums[(num_programs,)](
                    router_logits, attention_mask, squares, counts,
                    router_logits.shape[0], *router_logits.stride(), attention_mask.stride(0), **constants,
                )  # fmt: skip
            _z_loss[(1,)](squares, counts, loss, slope, num_programs, BLOCK_PROGRAMS=triton.next_power_of_2(MOST_PROGRAMS))
        ctx.save_for_backward(router_logits, attention_mask, slope)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _grad_logits(_z_backward, ctx, grad), None


def load_balancing_loss(router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the load-balancing loss: `reference.torch.auxiliary_losses.load_balancing_loss`, in one pass over the logits.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides; where masked, any values, NaN too.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1, any strides.
        attention_mask: [num_tokens], bool, False for padding.

    Returns:
        [], float32 (float64 for float64 logits); 0 where no token counts. Differentiable once, in router_logits.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or Triton cannot run on
            the device.

    Source: Switch Transformers (arXiv:2101.03961), equations 4 to 6.
    """
    validation.load_balancing_loss(router_logits, topk_ids, attention_mask)
    validation.expert_ids_in_range(topk_ids, num_experts=router_logits.shape[1])
    require_triton_device("router_logits", router_logits)
    return _LoadBalancingLoss.apply(router_logits, topk_ids, attention_mask)


def router_z_loss(router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the z-loss: `reference.torch.auxiliary_losses.router_z_loss`, in one pass over the logits.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides; where masked, any values, NaN too.
        attention_mask: [num_tokens], bool, False for padding.

    Returns:
        [], float32 (float64 for float64 logits); 0 where no token counts. Differentiable once, in router_logits.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or Triton cannot run on the device.

    Source: ST-MoE (arXiv:2202.08906), equation 5.
    """
    validation.router_z_loss(router_logits, attention_mask)
    require_triton_device("router_logits", router_logits)
    return _RouterZLoss.apply(router_logits, attention_mask)
