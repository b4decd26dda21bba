"""Losses that keep the load of experts even, and how undecided a router is.

Each reads the logits once, as `token_sums` says: the balance losses add up of each expert, in programs of their
sequence, and take one program more for each sequence. Backward reads the logits again and writes their gradient, once
each. All is bound by memory, or by the launches where tokens are few.

Any strides will do.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.arithmetic import divide, exponentials_of, through_softmax
from gaugeblock.optimized.triton.launch import device_of, program_rows, require_triton_device
from gaugeblock.optimized.triton.token_sums import MOST_PROGRAMS, add_choices, blocks_of, is_counted, load_logits, mean_of
from gaugeblock.reference import validation
from gaugeblock.reference.configs import ScoreFunction

# Sums that the last program has in registers: 32 per thread of eight warps.
LAST_TILE = 8192


@triton.jit
def _probabilities(logits, SIGMOID: tl.constexpr):
    """Return the softmax of logits, or their sigmoids divided by the sum of these."""
    if SIGMOID:
        # the softmax of log(sigmoid), which has a value also where every sigmoid underflows
        logits = tl.minimum(logits, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logits)))
    exponentials, total, _ = exponentials_of(logits)
    return divide(exponentials, total)


@triton.jit
def _place(num_programs):
    """Return this program's sequence, and its place among the sequence's programs; int64, for they are multiplied by strides."""
    program = tl.program_id(0).to(tl.int64)
    return program // num_programs, program % num_programs


@triton.jit(do_not_specialize=["num_tokens", "num_programs"])
def _balance_sums(
    logits_ptr, ids_ptr, mask_ptr, probabilities_ptr, assignments_ptr, num_tokens, num_programs,
    logits_sequence_stride, row_stride, column_stride, ids_sequence_stride, ids_row_stride, ids_column_stride,
    mask_sequence_stride, mask_stride, top_k: tl.constexpr,
    num_experts: tl.constexpr, SIGMOID: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Add up, for each expert, the probabilities and the assignments of this program's tokens."""
    sequence, place = _place(num_programs)
    logits_ptr += sequence * logits_sequence_stride
    ids_ptr += sequence * ids_sequence_stride
    mask_ptr += sequence * mask_sequence_stride
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = probabilities_ptr.dtype.element_ty
    probabilities = tl.full([BLOCK_TOKENS, BLOCK_EXPERTS], 0.0, dtype)
    assignments = tl.full([BLOCK_TOKENS, BLOCK_EXPERTS], 0, tl.int32)
    for first in range(0, num_tokens, num_programs * BLOCK_TOKENS):
        rows = first + (place * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
        counted = is_counted(mask_ptr, mask_stride, rows, num_tokens)
        logits = load_logits(logits_ptr, row_stride, column_stride, rows, counted, experts, exists, dtype)
        probabilities += tl.where(counted, _probabilities(logits, SIGMOID), 0.0)
        assignments = add_choices(assignments, ids_ptr, ids_row_stride, ids_column_stride, rows, counted, experts, top_k)
    offsets = tl.program_id(0) * num_experts + tl.arange(0, BLOCK_EXPERTS)
    mask = tl.arange(0, BLOCK_EXPERTS) < num_experts
    tl.store(probabilities_ptr + offsets, tl.sum(probabilities, axis=0), mask=mask)
    tl.store(assignments_ptr + offsets, tl.sum(assignments, axis=0), mask=mask)


@triton.jit
def _balance_loss(
    probabilities_ptr, assignments_ptr, losses_ptr, counts_ptr, slopes_ptr, num_programs,
    num_experts: tl.constexpr, top_k: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Add up the sums of a sequence's programs; the slope of an expert is the derivative of the loss by its probabilities."""
    sequence = tl.program_id(0)
    experts = tl.arange(0, BLOCK_EXPERTS)
    dtype = probabilities_ptr.dtype.element_ty
    probabilities = tl.full([BLOCK_EXPERTS], 0.0, dtype)
    assignments = tl.full([BLOCK_EXPERTS], 0, tl.int64)
    for first in range(0, num_programs, BLOCK_PROGRAMS):
        programs = first + tl.arange(0, BLOCK_PROGRAMS)[:, None]
        offsets = (sequence * num_programs + programs) * num_experts + experts[None, :]
        mask = (programs < num_programs) & (experts < num_experts)[None, :]
        probabilities += tl.sum(tl.load(probabilities_ptr + offsets, mask=mask, other=0.0), axis=0)
        assignments += tl.sum(tl.load(assignments_ptr + offsets, mask=mask, other=0).to(tl.int64), axis=0)
    num_unmasked = tl.sum(assignments) // top_k
    num_tokens = tl.maximum(num_unmasked, 1).to(dtype)
    shares = divide(assignments.to(dtype), num_tokens * top_k)
    slopes = num_experts * divide(shares, num_tokens)
    tl.store(slopes_ptr + sequence * num_experts + experts, slopes, mask=experts < num_experts)
    tl.store(losses_ptr + sequence, tl.sum(slopes * probabilities))
    tl.store(counts_ptr + sequence, tl.minimum(num_unmasked, 1).to(tl.int32))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _balance_backward(
    logits_ptr, mask_ptr, slopes_ptr, scale_ptr, grad_ptr, grad_logits_ptr, num_tokens, num_blocks,
    logits_sequence_stride, row_stride, column_stride, mask_sequence_stride, mask_stride,
    num_experts: tl.constexpr, SIGMOID: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    sequence, place = _place(num_blocks)
    logits_ptr += sequence * logits_sequence_stride
    rows = (place * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    counted = is_counted(mask_ptr + sequence * mask_sequence_stride, mask_stride, rows, num_tokens)
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, counted, experts, exists, slopes_ptr.dtype.element_ty)
    slopes = tl.load(slopes_ptr + sequence * num_experts + experts, mask=exists, other=0.0)
    grads = tl.load(grad_ptr) * tl.load(scale_ptr) * through_softmax(_probabilities(logits, SIGMOID), slopes)
    if SIGMOID:  # the derivative of log(sigmoid(x)) is sigmoid(-x)
        decay = tl.exp(-tl.abs(logits))
        grads *= divide(tl.where(logits < 0, 1.0, decay), 1.0 + decay)
    offsets = (sequence * num_tokens + rows) * num_experts + experts
    tl.store(grad_logits_ptr + offsets, tl.where(counted, grads, 0.0), mask=(rows < num_tokens) & exists)


@triton.jit
def _below_highest(exponentials, logits, highest):
    """Return logits - highest, 0 where the exponential is: 0 * ln(0) is 0."""
    return tl.where(exponentials == 0, 0.0, logits - highest)


@triton.jit(do_not_specialize=["num_tokens"])
def _token_sums(
    logits_ptr, mask_ptr, sums_ptr, counts_ptr, num_tokens, row_stride, column_stride, mask_stride,
    num_experts: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Add up the entropy of this program's tokens, or the squares of their logsumexp; and the tokens."""
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = sums_ptr.dtype.element_ty
    sums = tl.full([BLOCK_TOKENS, 1], 0.0, dtype)
    counts = tl.full([BLOCK_TOKENS, 1], 0, tl.int32)
    for first in range(0, num_tokens, tl.num_programs(0) * BLOCK_TOKENS):
        rows = first + program_rows(BLOCK_TOKENS)[:, None]
        counted = is_counted(mask_ptr, mask_stride, rows, num_tokens)
        logits = load_logits(logits_ptr, row_stride, column_stride, rows, counted, experts, exists, dtype)
        exponentials, total, highest = exponentials_of(logits)
        if ENTROPY:
            below = _below_highest(exponentials, logits, highest)
            values = tl.log(total) - divide(tl.sum(exponentials * below, axis=1)[:, None], total)
        else:
            z = highest + tl.log(total)
            values = z * z
        sums += tl.where(counted, values, 0.0)
        counts += counted.to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums))
    tl.store(counts_ptr + tl.program_id(0), tl.sum(counts))


@triton.jit(do_not_specialize=["num_tokens"])
def _token_backward(
    logits_ptr, mask_ptr, slope_ptr, grad_ptr, grad_logits_ptr, num_tokens, row_stride, column_stride, mask_stride,
    num_experts: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = -p * (ln(p) + entropy) * slope, or 2 * z * p * slope."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    counted = is_counted(mask_ptr, mask_stride, rows, num_tokens)
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, counted, experts, exists, slope_ptr.dtype.element_ty)
    exponentials, total, highest = exponentials_of(logits)
    probabilities = divide(exponentials, total)
    if ENTROPY:  # what ln(p) and the entropy have in common falls out
        grads = through_softmax(probabilities, -_below_highest(exponentials, logits, highest))
    else:
        grads = 2.0 * (highest + tl.log(total)) * probabilities
    grads *= tl.load(grad_ptr) * tl.load(slope_ptr)
    tl.store(grad_logits_ptr + rows * num_experts + experts, tl.where(counted, grads, 0.0), mask=(rows < num_tokens) & exists)


class _BalanceLoss(torch.autograd.Function):
    """Of sequences: logits [num_sequences, num_tokens, num_experts]."""

    @staticmethod
    def forward(
        ctx: Any, router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor, sigmoid: bool
    ) -> Any:
        num_sequences, num_tokens, num_experts = router_logits.shape
        num_blocks, constants = blocks_of(num_tokens, num_experts)
        of_each = MOST_PROGRAMS // max(1, num_sequences)
        num_programs = min(num_blocks, max(1, of_each))
        dtype = torch.promote_types(router_logits.dtype, torch.float32)
        probabilities = router_logits.new_empty((num_sequences, num_programs, num_experts), dtype=dtype)
        assignments = torch.empty_like(probabilities, dtype=torch.int32)
        losses, slopes = probabilities.new_empty(num_sequences), probabilities.new_empty(num_sequences, num_experts)
        counts = torch.empty_like(losses, dtype=torch.int32)
        top_k = topk_ids.shape[2]
        with device_of(router_logits):
            if num_sequences * num_programs:
                _balance_sums[(num_sequences * num_programs,)](
                    router_logits, topk_ids, attention_mask, probabilities, assignments, num_tokens, num_programs,
                    *router_logits.stride(), *topk_ids.stride(), *attention_mask.stride(),
                    top_k=top_k, SIGMOID=sigmoid, **constants,
                )  # fmt: skip
            if num_sequences:
                _balance_loss[(num_sequences,)](
                    probabilities, assignments, losses, counts, slopes, num_programs,
                    num_experts=num_experts, top_k=top_k, BLOCK_EXPERTS=constants["BLOCK_EXPERTS"],
                    BLOCK_PROGRAMS=max(1, LAST_TILE // constants["BLOCK_EXPERTS"]), num_warps=8,
                )  # fmt: skip
            loss, scale = mean_of(losses, counts)
        ctx.sigmoid = sigmoid
        ctx.save_for_backward(router_logits, attention_mask, slopes, scale)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        router_logits, attention_mask, slopes, scale = ctx.saved_tensors
        grad_logits = router_logits.new_empty(router_logits.shape)
        num_sequences, num_tokens, num_experts = router_logits.shape
        num_blocks, constants = blocks_of(num_tokens, num_experts)
        if num_sequences * num_blocks:
            with device_of(router_logits):
                _balance_backward[(num_sequences * num_blocks,)](
                    router_logits, attention_mask, slopes, scale, grad, grad_logits, num_tokens, num_blocks,
                    *router_logits.stride(), *attention_mask.stride(), SIGMOID=ctx.sigmoid, **constants,
                )  # fmt: skip
        return grad_logits, None, None, None


class _MeanOverTokens(torch.autograd.Function):
    """Of each token's entropy, or of the square of its logsumexp."""

    @staticmethod
    def forward(ctx: Any, router_logits: torch.Tensor, attention_mask: torch.Tensor, entropy: bool) -> torch.Tensor:
        num_blocks, constants = blocks_of(*router_logits.shape)
        num_programs = min(num_blocks, MOST_PROGRAMS)
        dtype = torch.promote_types(router_logits.dtype, torch.float32)
        sums = router_logits.new_empty(num_programs, dtype=dtype)
        counts = torch.empty_like(sums, dtype=torch.int32)
        with device_of(router_logits):
            if num_programs:
                _token_sums[(num_programs,)](
                    router_logits, attention_mask, sums, counts, router_logits.shape[0],
                    *router_logits.stride(), attention_mask.stride(0), ENTROPY=entropy, **constants,
                )  # fmt: skip
            mean, slope = mean_of(sums, counts)
        ctx.entropy = entropy
        ctx.save_for_backward(router_logits, attention_mask, slope)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        router_logits, attention_mask, slope = ctx.saved_tensors
        grad_logits = router_logits.new_empty(router_logits.shape)
        num_blocks, constants = blocks_of(*router_logits.shape)
        if num_blocks:
            with device_of(router_logits):
                _token_backward[(num_blocks,)](
                    router_logits, attention_mask, slope, grad, grad_logits, router_logits.shape[0],
                    *router_logits.stride(), attention_mask.stride(0), ENTROPY=ctx.entropy, **constants,
                )  # fmt: skip
        return grad_logits, None, None


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
    return _BalanceLoss.apply(router_logits[None], topk_ids[None], attention_mask[None], False)


def sequence_balance_loss(
    router_logits: torch.Tensor, topk_ids: torch.Tensor, attention_mask: torch.Tensor, *, scores: ScoreFunction
) -> torch.Tensor:
    """Return the mean loss of sequences: `reference.torch.auxiliary_losses.sequence_balance_loss`, in one pass over the logits.

    Args:
        router_logits: [batch_size, sequence_length, num_experts], any floating dtype, any strides; where masked, any
            values, NaN too.
        topk_ids: [batch_size, sequence_length, top_k], integer in 0..num_experts - 1, any strides.
        attention_mask: [batch_size, sequence_length], bool, False for padding.
        scores: "sigmoid" or "softmax".

    Returns:
        [], float32 (float64 for float64 logits); 0 where no token counts. Differentiable once, in router_logits.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, `scores` is neither of the two, or
            Triton cannot run on the device.

    Source: DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20.
    """
    validation.sequence_balance_loss(router_logits, topk_ids, attention_mask, scores)
    validation.expert_ids_in_range(topk_ids, num_experts=router_logits.shape[2])
    require_triton_device("router_logits", router_logits)
    return _BalanceLoss.apply(router_logits, topk_ids, attention_mask, scores == "sigmoid")


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
    return _MeanOverTokens.apply(router_logits, attention_mask, False)


def routing_entropy(router_logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return the mean entropy: `reference.torch.auxiliary_losses.routing_entropy`, in one pass over the logits.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides; where masked, any values, NaN too.
        attention_mask: [num_tokens], bool, False for padding.

    Returns:
        [], float32 (float64 for float64 logits); 0 where no token counts. Differentiable once, in router_logits.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or Triton cannot run on the device.

    Source: Shannon 1948, section 6.
    """
    validation.routing_entropy(router_logits, attention_mask)
    require_triton_device("router_logits", router_logits)
    return _MeanOverTokens.apply(router_logits, attention_mask, True)
