"""The kernels of the routers that choose experts by score: scores, choice and weights without a trip to memory between them.

One kernel forward and one backward for all of them; what a router scores by, whether a bias or groups decide, and what weights
are divided by are constants, of which each router compiles its own. Forward reads the logits and writes ids and weights, backward
reads logits, ids and the gradient of the weights and writes the whole gradient of the logits, each once: per token
`num_experts * logit_bytes + 12 * top_k` and `2 * num_experts * logit_bytes + 12 * top_k` bytes. Selection takes top_k maxima of
registers: a small top_k is bound by memory, a large one by arithmetic. The chosen logits are read a second time, from the
cache: gathering them from the registers spilled with 1024 experts.

Logits, bias and gradient are addressed by their strides; nothing is copied. A program has whole rows, and how many is decided by
the number of experts alone: the bits of a token do not depend on its batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.arithmetic import divide, through_softmax
from gaugeblock.optimized.triton.launch import device_of, program_rows, require_triton_device
from gaugeblock.optimized.triton.topk import choose_lanes, keys_of, no_key, scores_of

SUM_EPSILON = tl.constexpr(1e-20)


@triton.jit
def load_logits(logits_ptr, row_stride, column_stride, rows, experts, mask, dtype: tl.constexpr):
    """Return logits[rows, experts] in a compute dtype, 0 where masked."""
    offsets = rows * row_stride + experts.to(tl.int64) * column_stride
    return tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(dtype)


@triton.jit
def store_choice(weights_ptr, ids_ptr, weights, ids, rows, in_batch, columns, top_k: tl.constexpr):
    """Write the first top_k columns of weights and ids, both contiguous."""
    mask = in_batch & (columns < top_k)
    tl.store(weights_ptr + rows * top_k + columns, weights, mask=mask)
    tl.store(ids_ptr + rows * top_k + columns, ids.to(tl.int64), mask=mask)


@triton.jit
def _keep_best_groups(keys, dtype: tl.constexpr, num_groups, topk_groups, GROUP_BEST: tl.constexpr):
    """Return the keys [BLOCK_TOKENS, BLOCK_GROUPS, BLOCK_MEMBERS] of the best groups' members, and no keys for the others'.

    A group's score is the highest of its members, or the sum of the two highest (if it has two).
    """
    first, first_member = tl.max(keys, axis=2, return_indices=True)
    group_scores = scores_of(first, dtype)
    if GROUP_BEST == 2:
        is_first = tl.arange(0, keys.shape[2])[None, None, :] == first_member[:, :, None]
        second = tl.max(tl.where(is_first, no_key(keys.dtype), keys), axis=2)
        group_scores += scores_of(second, dtype)
    groups = tl.arange(0, keys.shape[1])[None, :]
    group_keys = keys_of(group_scores, groups < num_groups)
    for _ in range(topk_groups):
        best = tl.argmax(group_keys, axis=1)[:, None]
        group_keys = tl.where(groups == best, no_key(group_keys.dtype), group_keys)
    is_taken = (group_keys == no_key(group_keys.dtype))[:, :, None]  # or a group of padding
    return tl.where(is_taken, keys, no_key(keys.dtype))


@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, num_tokens, row_stride, column_stride, bias_stride,
    num_groups: tl.constexpr, group_size: tl.constexpr, topk_groups: tl.constexpr, top_k: tl.constexpr,
    SCORES: tl.constexpr, BIASED: tl.constexpr, GROUP_BEST: tl.constexpr, DIVISOR: tl.constexpr,
    divisor_min: tl.constexpr, routed_scaling_factor: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr, BLOCK_TOP_K: tl.constexpr,
):  # fmt: skip
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    # every group begins a block of lanes, so that a reshape gives groups of any size an axis of their own
    lanes = tl.arange(0, BLOCK_GROUPS * BLOCK_MEMBERS)[None, :]
    exists = (lanes // BLOCK_MEMBERS < num_groups) & (lanes % BLOCK_MEMBERS < group_size)
    experts = lanes // BLOCK_MEMBERS * group_size + lanes % BLOCK_MEMBERS
    dtype = weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & exists, dtype)
    logits = tl.where(exists, logits, float("-inf"))
    if SCORES == "softmax":
        highest = tl.max(logits, axis=1)[:, None]
        if BIASED or DIVISOR != "sum":
            total = tl.sum(tl.exp(logits - highest), axis=1)[:, None]

    # scores are in the order of their logits, and no underflow makes logits equal: only a bias needs the scores themselves
    choice_scores = logits
    if BIASED:
        bias = tl.load(bias_ptr + experts.to(tl.int64) * bias_stride, mask=exists, other=0.0)
        if SCORES == "softmax":
            choice_scores = divide(tl.exp(logits - highest), total) + bias
        else:
            choice_scores = tl.sigmoid(logits) + bias
    keys = keys_of(choice_scores, exists)
    if topk_groups < num_groups:
        member_keys = keys.reshape([BLOCK_TOKENS, BLOCK_GROUPS, BLOCK_MEMBERS])
        member_keys = _keep_best_groups(member_keys, choice_scores.dtype, num_groups, topk_groups, GROUP_BEST)
        keys = member_keys.reshape(keys.shape)

    chosen = choose_lanes(keys, top_k, BLOCK_TOP_K)
    columns = tl.arange(0, BLOCK_TOP_K)[None, :]
    is_column = columns < top_k
    ids = chosen // BLOCK_MEMBERS * group_size + chosen % BLOCK_MEMBERS
    chosen_logits = load_logits(logits_ptr, row_stride, column_stride, rows, ids, in_batch & is_column, dtype)
    if SCORES == "softmax":
        weights = tl.where(is_column, tl.exp(chosen_logits - highest), 0.0)
        if DIVISOR == "sum":  # the softmax of the chosen
            total = tl.sum(weights, axis=1)[:, None]
        weights = divide(weights, total)
    else:
        weights = tl.where(is_column, tl.sigmoid(chosen_logits), 0.0)
    if DIVISOR == "sum + epsilon":
        weights = divide(weights, (tl.sum(weights, axis=1) + SUM_EPSILON)[:, None])
    if DIVISOR == "sum, or the least":
        weights = divide(weights, tl.maximum(tl.sum(weights, axis=1), divisor_min)[:, None])
    store_choice(weights_ptr, ids_ptr, weights * routed_scaling_factor, ids, rows, in_batch, columns, top_k)


@triton.jit
def load_grads(grad_ptr, row_stride, column_stride, ids_ptr, rows, in_batch, experts, top_k: tl.constexpr):
    """Return where experts were chosen, and the gradient of their weights there, 0 elsewhere."""
    is_chosen = in_batch & (experts < 0)  # none yet
    grads = tl.full(is_chosen.shape, 0.0, grad_ptr.dtype.element_ty)
    pointers = grad_ptr + rows * row_stride
    for column in range(top_k):
        chosen = experts == tl.load(ids_ptr + rows * top_k + column, mask=in_batch, other=0).to(tl.int32)
        grads = tl.where(chosen, tl.load(pointers, mask=in_batch, other=0.0), grads)
        is_chosen |= chosen
        pointers += column_stride
    return is_chosen, grads


@triton.jit
def _grads_of_scores(scores, grads, is_chosen, DIVISOR: tl.constexpr, divisor_min: tl.constexpr):
    """Return the gradient of the chosen scores from that of the weights, scores / divisor; 0 where not chosen."""
    if DIVISOR == "sum + epsilon" or DIVISOR == "sum, or the least":
        chosen_scores = tl.where(is_chosen, scores, 0.0)
        total = tl.sum(chosen_scores, axis=1)
        if DIVISOR == "sum + epsilon":
            divisor = total + SUM_EPSILON
            of_sum = total >= 0  # always
        else:
            divisor = tl.maximum(total, divisor_min)
            of_sum = total >= divisor_min
        inner = divide(tl.sum(chosen_scores * grads, axis=1)[:, None], divisor[:, None])
        grads = tl.where(is_chosen, divide(grads - tl.where(of_sum[:, None], inner, 0.0), divisor[:, None]), 0.0)
    return grads


@triton.jit(do_not_specialize=["num_tokens"])
def _backward(
    grad_weights_ptr, ids_ptr, logits_ptr, grad_logits_ptr,
    num_tokens, grad_row_stride, grad_column_stride, row_stride, column_stride,
    num_experts: tl.constexpr, top_k: tl.constexpr, SCORES: tl.constexpr, DIVISOR: tl.constexpr,
    divisor_min: tl.constexpr, routed_scaling_factor: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = p * (dp - sum(p * dp)) of a softmax of all logits, or of the chosen; ds * s * (1 - s) of a sigmoid."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = grad_weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & exists, dtype)
    is_chosen, grads = load_grads(grad_weights_ptr, grad_row_stride, grad_column_stride, ids_ptr, rows, in_batch, experts, top_k)
    grads *= routed_scaling_factor
    if SCORES == "softmax":
        logits = tl.where(exists, logits, float("-inf"))
        exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        if DIVISOR == "sum":
            exponentials = tl.where(is_chosen, exponentials, 0.0)
        scores = divide(exponentials, tl.sum(exponentials, axis=1)[:, None])
        grads = _grads_of_scores(scores, grads, is_chosen, DIVISOR, divisor_min)
        grads = through_softmax(scores, grads)
    else:
        scores = tl.sigmoid(logits)
        grads = _grads_of_scores(scores, grads, is_chosen, DIVISOR, divisor_min)
        grads *= scores * tl.sigmoid(-logits)  # not 1 - s, which has no digits left where s is near 1
    tl.store(grad_logits_ptr + rows * num_experts + experts, grads, mask=in_batch & exists)


def launch_rows(kernel: Any, router_logits: torch.Tensor, lanes: int, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` over the rows of `router_logits`, each on `lanes` lanes.

    A program has as many rows as make 256 lanes, and a warp for each 512 lanes of a row. So a thread has at most 16, which leaves
    registers for float64, and up to 512 experts a maximum is a few shuffles within one warp.
    """
    num_tokens = router_logits.shape[0]
    block_tokens = max(1, 256 // lanes)
    if num_tokens:
        with device_of(router_logits):
            kernel[(triton.cdiv(num_tokens, block_tokens),)](
                *arguments, **constants, BLOCK_TOKENS=block_tokens, num_warps=max(1, lanes // 512)
            )


def empty_choice(router_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return topk_weights and topk_ids, to be written."""
    weights_dtype = torch.promote_types(router_logits.dtype, torch.float32)
    weights = router_logits.new_empty((router_logits.shape[0], top_k), dtype=weights_dtype)
    return weights, torch.empty_like(weights, dtype=torch.int64)


def options_of(
    *, top_k: int, scores: str, divisor: str = "", divisor_min: float = 0.0, routed_scaling_factor: float = 1.0
) -> dict[str, Any]:
    """Return what forward and backward must know alike.

    Args:
        scores: "softmax" or "sigmoid" of the logits, which weights are made of.
        divisor: What weights are divided by: "" for nothing; "sum" of the chosen; "sum + epsilon", of 1e-20; "sum, or the least",
            which is `divisor_min`.
        routed_scaling_factor: Multiplies every weight.
    """
    return {
        "top_k": int(top_k), "SCORES": scores, "DIVISOR": divisor, "divisor_min": float(divisor_min),
        "routed_scaling_factor": float(routed_scaling_factor),
    }  # fmt: skip


def grad_logits_of(
    router_logits: torch.Tensor, ids: torch.Tensor, grad_weights: torch.Tensor, options: dict[str, Any]
) -> torch.Tensor:
    """Return the gradient of the logits, contiguous, from that of the weights of the ids that were chosen."""
    num_tokens, num_experts = router_logits.shape
    grad_logits = router_logits.new_empty((num_tokens, num_experts))
    block_experts = triton.next_power_of_2(num_experts)
    launch_rows(
        _backward, router_logits, block_experts,
        grad_weights, ids, router_logits, grad_logits, num_tokens, *grad_weights.stride(), *router_logits.stride(),
        num_experts=num_experts, **options, BLOCK_EXPERTS=block_experts,
    )  # fmt: skip
    return grad_logits


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, router_logits: torch.Tensor, bias: torch.Tensor | None, num_groups: int, topk_groups: int, group_best: int,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        num_tokens, num_experts = router_logits.shape
        weights, ids = empty_choice(router_logits, options["top_k"])
        group_size = num_experts // num_groups
        block_groups, block_members = triton.next_power_of_2(num_groups), triton.next_power_of_2(group_size)
        launch_rows(
            _forward, router_logits, block_groups * block_members,
            router_logits, bias, weights, ids, num_tokens, *router_logits.stride(), 0 if bias is None else bias.stride(0),
            num_groups=num_groups, group_size=group_size, topk_groups=topk_groups, **options,
            BIASED=bias is not None, GROUP_BEST=min(group_best, group_size),
            BLOCK_GROUPS=block_groups, BLOCK_MEMBERS=block_members, BLOCK_TOP_K=triton.next_power_of_2(options["top_k"]),
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, router_logits)
        ctx.options = options
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        ids, router_logits = ctx.saved_tensors
        return grad_logits_of(router_logits, ids, grad_weights, ctx.options), None, None, None, None, None


def route(
    router_logits: torch.Tensor,
    e_score_correction_bias: torch.Tensor | None = None,
    *,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_best: int = 1,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and ids of the `top_k` experts of highest score, of the best groups; differentiable once, in the logits.

    Args:
        e_score_correction_bias: Is added to the scores that experts are chosen by; without it they are chosen by their logits.
        group_best: How many scores of a group add up to its own, 1 or 2.
        options: Of `options_of`, constants of the compiled kernel.

    Raises:
        ValueError: Triton cannot run where `router_logits` lies.
    """
    require_triton_device("router_logits", router_logits)
    # detached, else a bias that asks for a gradient makes the weights ask for one
    bias = None if e_score_correction_bias is None else e_score_correction_bias.detach()
    return _Route.apply(router_logits, bias, int(num_groups), int(topk_groups), group_best, options_of(**options))
