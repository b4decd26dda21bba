"""Routers whose experts have room for so many tokens: a choice, and a scan over the choices.

`switch_top1` chooses by `softmax_topk` with one expert a token, forward and backward; `gshard_top2` by a kernel of its own,
since its second choice may be by other scores, and backward as `softmax_topk` with two. A choice's place among those of
its expert is the number of them in earlier blocks of choices, and before it in its own. So two kernels follow: how many
choices of each block are of each expert; and, when torch has added those up over the blocks, which came too late. They
read 16 bytes a choice and write one, and 4 bytes a block and expert, little beside the logits; torch sets the weights of
the late to 0. Places are integers, so that nothing depends on the order of programs.

`expert_choice` needs no places: one kernel writes all probabilities, expert by expert, torch.topk chooses along a row of
tokens, which may be long, and one kernel backward makes the probabilities anew.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.arithmetic import divide, softmax_of, through_softmax
from gaugeblock.optimized.triton.launch import device_of, program_rows, require_triton_device
from gaugeblock.optimized.triton.routers import softmax_topk
from gaugeblock.optimized.triton.routing import empty_choice, grad_logits_of, launch_rows, load_logits, options_of, store_choice
from gaugeblock.optimized.triton.token_sums import is_counted
from gaugeblock.optimized.triton.topk import choose_lanes, highest_key, keys_of
from gaugeblock.reference import validation
from gaugeblock.reference.configs import SMALLEST_WEIGHT_SUM, SecondExpertPolicy
from gaugeblock.reference.torch.capacity_routers import chosen_tokens, expert_capacity

BLOCK_CHOICES = 64  # compared with each other: 4096 pairs, 32 a thread of 4 warps
BLOCK_EXPERTS = 64  # compared with a block of choices at a time


@triton.jit(do_not_specialize=["num_choices"])
def _count_choices(ids_ptr, counts_ptr, num_choices, num_experts, BLOCK_CHOICES: tl.constexpr, BLOCK_EXPERTS: tl.constexpr):
    """counts[block, e] = choices of the block that are e."""
    rows = program_rows(BLOCK_CHOICES)
    ids = tl.load(ids_ptr + rows, mask=rows < num_choices, other=-1)
    counts_ptr += tl.program_id(0).to(tl.int64) * num_experts
    for first in range(0, num_experts, BLOCK_EXPERTS):
        experts = first + tl.arange(0, BLOCK_EXPERTS)
        chosen = (ids[:, None] == experts[None, :]).to(tl.int32)
        tl.store(counts_ptr + experts, tl.sum(chosen, axis=0), mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_choices", "capacity"])
def _find_overflow(
    ids_ptr, counts_ptr, ends_ptr, dropped_ptr, num_choices, num_experts, capacity, BLOCK_CHOICES: tl.constexpr
):  # fmt: skip
    """dropped = place of the choice among those of its expert, the first being 0, >= capacity; or no expert is asked."""
    rows = program_rows(BLOCK_CHOICES)
    in_batch = rows < num_choices
    ids = tl.load(ids_ptr + rows, mask=in_batch, other=-1)
    is_asked = ids >= 0
    places = tl.arange(0, BLOCK_CHOICES)
    is_before = (ids[:, None] == ids[None, :]) & (places[None, :] < places[:, None])
    cells = tl.program_id(0).to(tl.int64) * num_experts + ids
    in_earlier_blocks = tl.load(ends_ptr + cells, mask=is_asked, other=0) - tl.load(counts_ptr + cells, mask=is_asked, other=0)
    dropped = in_earlier_blocks + tl.sum(is_before.to(tl.int32), axis=1) >= capacity
    tl.store(dropped_ptr + rows, dropped | ~is_asked, mask=in_batch)


def overflow(expert_ids: torch.Tensor, num_experts: int, capacity: int) -> torch.Tensor:
    """Return which choices come after `capacity` others of the same expert, or are of none, [choices], bool.

    Args:
        expert_ids: [choices], int64 in -1..num_experts - 1, contiguous; -1 where no expert is asked for room.
    """
    choices = expert_ids.shape[0]
    dropped = torch.empty_like(expert_ids, dtype=torch.bool)
    if choices:
        blocks = triton.cdiv(choices, BLOCK_CHOICES)
        counts = expert_ids.new_empty((blocks, num_experts), dtype=torch.int32)
        with device_of(expert_ids):
            _count_choices[(blocks,)](expert_ids, counts, choices, num_experts, BLOCK_CHOICES, BLOCK_EXPERTS)
            ends = counts.cumsum(0, dtype=torch.int32)
            _find_overflow[(blocks,)](expert_ids, counts, ends, dropped, choices, num_experts, capacity, BLOCK_CHOICES)
    return dropped


def switch_top1(router_logits: torch.Tensor, *, capacity_factor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose one expert of each token, if there is room: `reference.torch.capacity_routers.switch_top1`.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides.
        capacity_factor: Room in all experts together, in tokens per token; positive.

    Returns:
        weights: [num_tokens], float32 (float64 for float64 logits); differentiable once.
        expert_ids: [num_tokens], int64; NaN highest, of equals the lower id.
        dropped: [num_tokens], bool.

    Raises:
        TypeError: `router_logits` is not a floating array, or `capacity_factor` is not a number.
        ValueError: `router_logits` is not of rank 2, has no experts or is not where Triton runs, or
            `capacity_factor` is not positive.

    Source: Switch Transformers (arXiv:2101.03961), section 2.2, equation 3, and figure 3.
    """
    validation.switch_top1(router_logits, capacity_factor)
    topk_weights, topk_ids = softmax_topk(router_logits, top_k=1, renormalize=False)
    num_tokens, num_experts = router_logits.shape
    expert_ids, capacity = topk_ids[:, 0], expert_capacity(num_tokens, num_experts, capacity_factor)
    dropped = overflow(expert_ids, num_experts, capacity)
    return topk_weights[:, 0].masked_fill(dropped, 0), expert_ids, dropped


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_two(
    logits_ptr, noise_ptr, mask_ptr, weights_ptr, ids_ptr, asked_ptr,
    num_tokens, row_stride, column_stride, noise_row_stride, noise_column_stride, mask_stride,
    num_experts: tl.constexpr, policy: tl.constexpr, renormalize: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """asked[0, t], asked[1, t] = the two ids, -1 where the expert is not asked for room."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    is_token = is_counted(mask_ptr, mask_stride, rows, num_tokens)
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, is_token & exists, dtype)
    logits = tl.where(exists, logits, float("-inf"))
    scores = logits
    if policy == "sampling":
        scores += load_logits(noise_ptr, noise_row_stride, noise_column_stride, rows, experts, is_token & exists, dtype)
    first = tl.argmax(keys_of(logits, exists), axis=1)[:, None]
    keys = keys_of(scores, exists)
    ids = choose_lanes(tl.where(experts == first, highest_key(keys.dtype), keys), 2, 2)

    columns = tl.arange(0, 2)[None, :]
    chosen_logits = load_logits(logits_ptr, row_stride, column_stride, rows, ids, is_token, dtype)
    highest = tl.max(logits, axis=1)[:, None]
    weights = tl.exp(chosen_logits - highest)
    if renormalize:
        total = tl.sum(weights, axis=1)
    else:
        total = tl.sum(tl.exp(logits - highest), axis=1)
    weights = divide(weights, total[:, None])
    asks = is_token & (columns < 2)
    if policy == "random":
        drawn = load_logits(noise_ptr, noise_row_stride, noise_column_stride, rows, ids, is_token, dtype)
        asks &= (columns == 0) | (2 * weights > drawn)
    store_choice(weights_ptr, ids_ptr, weights, ids, rows, in_batch, columns, 2)
    tl.store(asked_ptr + columns * num_tokens + rows, tl.where(asks, ids, -1).to(tl.int64), mask=in_batch)


class _TwoChoices(torch.autograd.Function):
    """Weights before any is dropped, ids, and which experts are asked for room, [2, num_tokens]."""

    @staticmethod
    def forward(
        ctx: Any, router_logits: torch.Tensor, noise: torch.Tensor, attention_mask: torch.Tensor, policy: str, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = router_logits.shape
        weights, ids = empty_choice(router_logits, 2)
        asked = ids.new_empty((2, num_tokens))
        block_experts = triton.next_power_of_2(num_experts)
        launch_rows(
            _choose_two, router_logits, block_experts,
            router_logits, noise, attention_mask, weights, ids, asked,
            num_tokens, *router_logits.stride(), *noise.stride(), *attention_mask.stride(),
            num_experts=num_experts, policy=policy, renormalize=renormalize, BLOCK_EXPERTS=block_experts,
        )  # fmt: skip
        ctx.mark_non_differentiable(ids, asked)
        ctx.save_for_backward(ids, router_logits, attention_mask)
        ctx.options = options_of(top_k=2, scores="softmax", divisor="sum" if renormalize else "")
        return weights, ids, asked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        ids, router_logits, attention_mask = ctx.saved_tensors
        grad_logits = grad_logits_of(router_logits, ids, grad_weights, ctx.options)
        is_padding = ~attention_mask[:, None]  # of which the kernel reads the logits, whatever they are
        return grad_logits.masked_fill_(is_padding, 0), None, None, None, None


def gshard_top2(
    router_logits: torch.Tensor,
    noise: torch.Tensor | None,
    attention_mask: torch.Tensor,
    *,
    second_expert_policy: SecondExpertPolicy,
    normalize_before_dropping: bool,
    capacity_factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose two experts of each token, if there is room: `reference.torch.capacity_routers.gshard_top2`.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides, two experts at least.
        noise: [num_tokens, num_experts], floating, any strides; may be None if the policy is "all".
        attention_mask: [num_tokens], bool, any stride, False for padding.
        second_expert_policy: "all", "sampling" or "random".
        normalize_before_dropping: Whether the two weights sum to 1 before one is dropped, or afterwards.
        capacity_factor: Room in all experts together, in tokens per token; positive.

    Returns:
        topk_weights: [num_tokens, 2], float32 (float64 for float64 logits); differentiable once.
        topk_ids: [num_tokens, 2], int64, the first and the second; NaN highest, of equals the lower id.
        dropped: [num_tokens, 2], bool.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `capacity_factor` is not a number.
        ValueError: Ranks, sizes or devices do not fit together or are none of Triton's, there are fewer than two experts,
            the policy is none of the three or lacks its noise, or `capacity_factor` is not positive.

    Source: GShard (arXiv:2006.16668), algorithm 1; NLLB (arXiv:2207.04672).
    """
    validation.gshard_top2(router_logits, noise, attention_mask, second_expert_policy, capacity_factor)
    require_triton_device("router_logits", router_logits)
    num_tokens, num_experts = router_logits.shape
    drawn = router_logits if noise is None else noise  # "all" reads neither
    weights, ids, asked = _TwoChoices.apply(
        router_logits, drawn.detach(), attention_mask, second_expert_policy, bool(normalize_before_dropping)
    )
    capacity = expert_capacity(num_tokens, num_experts, capacity_factor)
    dropped = overflow(asked.view(-1), num_experts, capacity).view(2, num_tokens).T
    kept = weights.masked_fill(dropped, 0)
    if not normalize_before_dropping:
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=SMALLEST_WEIGHT_SUM)
    return kept, ids, dropped


@triton.jit(do_not_specialize=["num_tokens"])
def _probabilities_by_expert(
    logits_ptr, probabilities_ptr, num_tokens, row_stride, column_stride,
    num_experts: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """probabilities[e, t] = softmax(logits[t])[e]."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    is_cell = (rows < num_tokens) & (experts < num_experts)
    dtype = probabilities_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, is_cell, dtype)
    probabilities = softmax_of(tl.where(experts < num_experts, logits, float("-inf")))
    tl.store(probabilities_ptr + experts.to(tl.int64) * num_tokens + rows, probabilities, mask=is_cell)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_by_expert(
    grads_ptr, logits_ptr, grad_logits_ptr, num_tokens, row_stride, column_stride,
    num_experts: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = p * (dp - sum(p * dp)), where grads[e, t] = dp[t, e]."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    is_cell = (rows < num_tokens) & (experts < num_experts)
    dtype = grads_ptr.dtype.element_ty
    grads = tl.load(grads_ptr + experts.to(tl.int64) * num_tokens + rows, mask=is_cell, other=0.0)
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, is_cell, dtype)
    probabilities = softmax_of(tl.where(experts < num_experts, logits, float("-inf")))
    tl.store(grad_logits_ptr + rows * num_experts + experts, through_softmax(probabilities, grads), mask=is_cell)


class _ExpertChoice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, router_logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = router_logits.shape
        dtype = torch.promote_types(router_logits.dtype, torch.float32)
        probabilities = router_logits.new_empty((num_experts, num_tokens), dtype=dtype)
        _launch(_probabilities_by_expert, router_logits, router_logits, probabilities)
        weights, ids = torch.topk(probabilities, count, dim=-1)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, router_logits)
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        ids, router_logits = ctx.saved_tensors
        num_tokens, num_experts = router_logits.shape
        grads = grad_weights.new_zeros((num_experts, num_tokens)).scatter_(1, ids, grad_weights)
        grad_logits = router_logits.new_empty((num_tokens, num_experts))
        _launch(_backward_by_expert, router_logits, grads, router_logits, grad_logits)
        return grad_logits, None


def _launch(kernel: Any, router_logits: torch.Tensor, *arrays: torch.Tensor) -> None:
    num_tokens, num_experts = router_logits.shape
    block_experts = triton.next_power_of_2(num_experts)
    launch_rows(
        kernel, router_logits, block_experts, *arrays, num_tokens, *router_logits.stride(),
        num_experts=num_experts, BLOCK_EXPERTS=block_experts,
    )  # fmt: skip


def expert_choice(router_logits: torch.Tensor, *, capacity_factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Let each expert choose its most probable tokens: `reference.torch.capacity_routers.expert_choice`.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides.
        capacity_factor: Experts per token, on average; positive.

    Returns:
        weights: [num_experts, capacity], float32 (float64 for float64 logits); differentiable once.
        token_ids: [num_experts, capacity], int64, by descending probability, of equals any; NaN highest.

    Raises:
        TypeError: `router_logits` is not a floating array, or `capacity_factor` is not a number.
        ValueError: `router_logits` is not of rank 2, has no experts or is not where Triton runs, or
            `capacity_factor` is not positive.

    Source: Mixture-of-Experts with Expert Choice Routing (arXiv:2202.09368), section 3.2.
    """
    validation.expert_choice(router_logits, capacity_factor)
    require_triton_device("router_logits", router_logits)
    num_tokens, num_experts = router_logits.shape
    return _ExpertChoice.apply(router_logits, chosen_tokens(num_tokens, num_experts, capacity_factor))
