"""Routers, fused: scores, selection and renormalization without a trip to memory between them.

One kernel forward and one backward per router. Forward reads the logits and writes ids and weights, backward
reads logits, ids and the gradient of the weights and writes the whole gradient of the logits, each once: per
token `num_experts * logit_bytes + 12 * top_k` and `2 * num_experts * logit_bytes + 12 * top_k` bytes.
Selection takes top_k maxima of registers: a small top_k is bound by memory, a large one by arithmetic. The chosen
logits are read a second time, from the cache: gathering them from the registers spilled with 1024 experts.

Logits, bias and gradient are addressed by their strides; nothing is copied. A program has whole rows, and how
many is decided by the number of experts alone: the bits of a token do not depend on its batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.launch import device_of, program_rows, require_triton_device
from gaugeblock.optimized.triton.topk import choose_lanes, keys_of, no_key, scores_of
from gaugeblock.reference import validation

RENORMALIZE_EPSILON = tl.constexpr(1e-20)


@triton.jit
def divide(x, y):
    """Return x / y, correctly rounded; `/` of float32 is an approximation on GPUs."""
    if x.dtype == tl.float64:
        quotient = x / y
    else:
        quotient = tl.div_rn(x, tl.broadcast_to(y, x.shape))
    return quotient


@triton.jit
def load_logits(logits_ptr, row_stride, column_stride, rows, experts, mask, dtype: tl.constexpr):
    """Return logits[rows, experts] in a compute dtype, 0 where masked."""
    offsets = rows * row_stride + experts.to(tl.int64) * column_stride
    return tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(dtype)


@triton.jit
def store_choice(weights_ptr, ids_ptr, weights, ids, rows, in_batch, columns, top_k: tl.constexpr):
    mask = in_batch & (columns < top_k)
    tl.store(weights_ptr + rows * top_k + columns, weights, mask=mask)
    tl.store(ids_ptr + rows * top_k + columns, ids.to(tl.int64), mask=mask)


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


@triton.jit(do_not_specialize=["num_tokens"])
def _softmax_topk_forward(
    logits_ptr, weights_ptr, ids_ptr, num_tokens, row_stride, column_stride,
    num_experts: tl.constexpr, top_k: tl.constexpr, renormalize: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_TOP_K: tl.constexpr,
):  # fmt: skip
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & exists, dtype)
    logits = tl.where(exists, logits, float("-inf"))

    # probabilities are in the order of their logits, and underflow makes no logits equal
    ids = choose_lanes(keys_of(logits, exists), top_k, BLOCK_TOP_K)
    columns = tl.arange(0, BLOCK_TOP_K)[None, :]
    is_column = columns < top_k
    chosen_logits = load_logits(logits_ptr, row_stride, column_stride, rows, ids, in_batch & is_column, dtype)
    highest = tl.max(logits, axis=1)[:, None]
    weights = tl.where(is_column, tl.exp(chosen_logits - highest), 0.0)
    if renormalize:
        total = tl.sum(weights, axis=1)
    else:
        total = tl.sum(tl.exp(logits - highest), axis=1)
    store_choice(weights_ptr, ids_ptr, divide(weights, total[:, None]), ids, rows, in_batch, columns, top_k)


@triton.jit(do_not_specialize=["num_tokens"])
def _softmax_topk_backward(
    grad_weights_ptr, ids_ptr, logits_ptr, grad_logits_ptr,
    num_tokens, grad_row_stride, grad_column_stride, row_stride, column_stride,
    num_experts: tl.constexpr, top_k: tl.constexpr, renormalize: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = p * (dp - sum(p * dp)), p being the softmax of all logits or, if renormalized, of the chosen."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = grad_weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & exists, dtype)
    is_chosen, grads = load_grads(grad_weights_ptr, grad_row_stride, grad_column_stride, ids_ptr, rows, in_batch, experts, top_k)

    logits = tl.where(exists, logits, float("-inf"))
    exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    if renormalize:
        exponentials = tl.where(is_chosen, exponentials, 0.0)
    probabilities = divide(exponentials, tl.sum(exponentials, axis=1)[:, None])
    # centered twice: where a probability is near 1, what rounding leaves of the mean is as large as the gradient
    for _ in tl.static_range(2):
        grads -= tl.sum(probabilities * grads, axis=1)[:, None]
    grads *= probabilities
    tl.store(grad_logits_ptr + rows * num_experts + experts, grads, mask=in_batch & exists)


@triton.jit(do_not_specialize=["num_tokens"])
def _grouped_sigmoid_topk_forward(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, num_tokens, row_stride, column_stride, bias_stride,
    num_groups: tl.constexpr, group_size: tl.constexpr, topk_groups: tl.constexpr,
    top_k: tl.constexpr, renormalize: tl.constexpr, routed_scaling_factor: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_MEMBERS: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
):  # fmt: skip
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    # every group begins a block of lanes, so that a reshape gives groups of any size an axis of their own
    lanes = tl.arange(0, BLOCK_GROUPS * BLOCK_MEMBERS)[None, :]
    exists = (lanes // BLOCK_MEMBERS < num_groups) & (lanes % BLOCK_MEMBERS < group_size)
    experts = lanes // BLOCK_MEMBERS * group_size + lanes % BLOCK_MEMBERS
    dtype = weights_ptr.dtype.element_ty
    scores = tl.sigmoid(load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & exists, dtype))
    bias = tl.load(bias_ptr + experts.to(tl.int64) * bias_stride, mask=exists, other=0.0)
    choice_scores = scores + bias
    keys = keys_of(choice_scores, exists)
    if topk_groups < num_groups:
        member_keys = keys.reshape([BLOCK_TOKENS, BLOCK_GROUPS, BLOCK_MEMBERS])
        first, first_member = tl.max(member_keys, axis=2, return_indices=True)
        group_scores = scores_of(first, choice_scores.dtype)
        if group_size > 1:
            is_first = tl.arange(0, BLOCK_MEMBERS)[None, None, :] == first_member[:, :, None]
            second = tl.max(tl.where(is_first, no_key(keys.dtype), member_keys), axis=2)
            group_scores += scores_of(second, choice_scores.dtype)
        groups = tl.arange(0, BLOCK_GROUPS)[None, :]
        group_keys = keys_of(group_scores, groups < num_groups)
        for _ in range(topk_groups):
            best = tl.argmax(group_keys, axis=1)[:, None]
            group_keys = tl.where(groups == best, no_key(group_keys.dtype), group_keys)
        is_taken = (group_keys == no_key(group_keys.dtype))[:, :, None]  # or a group of padding
        keys = tl.where(is_taken, member_keys, no_key(keys.dtype)).reshape(keys.shape)

    chosen = choose_lanes(keys, top_k, BLOCK_TOP_K)
    columns = tl.arange(0, BLOCK_TOP_K)[None, :]
    is_column = columns < top_k
    ids = chosen // BLOCK_MEMBERS * group_size + chosen % BLOCK_MEMBERS
    chosen_logits = load_logits(logits_ptr, row_stride, column_stride, rows, ids, in_batch & is_column, dtype)
    weights = tl.where(is_column, tl.sigmoid(chosen_logits), 0.0)
    if renormalize:
        weights = divide(weights, (tl.sum(weights, axis=1) + RENORMALIZE_EPSILON)[:, None])
    store_choice(weights_ptr, ids_ptr, weights * routed_scaling_factor, ids, rows, in_batch, columns, top_k)


@triton.jit(do_not_specialize=["num_tokens"])
def _grouped_sigmoid_topk_backward(
    grad_weights_ptr, ids_ptr, logits_ptr, grad_logits_ptr,
    num_tokens, grad_row_stride, grad_column_stride, row_stride, column_stride,
    num_experts: tl.constexpr,
    top_k: tl.constexpr, renormalize: tl.constexpr, routed_scaling_factor: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = ds * s * (1 - s), where ds = (dw - sum(w * dw)) / total if w = s / total; 0 where not chosen."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = grad_weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & exists, dtype)
    is_chosen, grads = load_grads(grad_weights_ptr, grad_row_stride, grad_column_stride, ids_ptr, rows, in_batch, experts, top_k)

    scores = tl.sigmoid(logits)
    grads *= routed_scaling_factor
    if renormalize:
        chosen_scores = tl.where(is_chosen, scores, 0.0)
        total = (tl.sum(chosen_scores, axis=1) + RENORMALIZE_EPSILON)[:, None]
        inner = divide(tl.sum(chosen_scores * grads, axis=1)[:, None], total)
        grads = tl.where(is_chosen, divide(grads - inner, total), 0.0)
    grads *= scores * tl.sigmoid(-logits)  # not 1 - s, which has no digits left where s is near 1
    tl.store(grad_logits_ptr + rows * num_experts + experts, grads, mask=in_batch & exists)


def launch_rows(kernel: Any, router_logits: torch.Tensor, lanes: int, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` over the rows of `router_logits`, each on `lanes` lanes.

    A program has as many rows as make 256 lanes, and a warp for each 512 lanes of a row. So a thread has at
    most 16, which leaves registers for float64, and up to 512 experts a maximum is a few shuffles within one
    warp.
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


def _grad_logits(kernel: Any, ctx: Any, grad_weights: torch.Tensor) -> torch.Tensor:
    """Run a backward kernel, which reads what its forward saved."""
    ids, router_logits = ctx.saved_tensors
    num_tokens, num_experts = router_logits.shape
    grad_logits = router_logits.new_empty((num_tokens, num_experts))
    block_experts = triton.next_power_of_2(num_experts)
    launch_rows(
        kernel, router_logits, block_experts,
        grad_weights, ids, router_logits, grad_logits,
        num_tokens, *grad_weights.stride(), *router_logits.stride(),
        num_experts=num_experts, **ctx.options, BLOCK_EXPERTS=block_experts,
    )  # fmt: skip
    return grad_logits


class _SoftmaxTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, router_logits: torch.Tensor, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = router_logits.shape
        weights, ids = empty_choice(router_logits, options["top_k"])
        block_experts = triton.next_power_of_2(num_experts)
        launch_rows(
            _softmax_topk_forward, router_logits, block_experts,
            router_logits, weights, ids, num_tokens, *router_logits.stride(),
            num_experts=num_experts, **options,
            BLOCK_EXPERTS=block_experts, BLOCK_TOP_K=triton.next_power_of_2(options["top_k"]),
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, router_logits)
        ctx.options = options
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        return _grad_logits(_softmax_topk_backward, ctx, grad_weights), None


class _GroupedSigmoidTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, router_logits: torch.Tensor, bias: torch.Tensor, num_groups: int, topk_groups: int,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        num_tokens, num_experts = router_logits.shape
        weights, ids = empty_choice(router_logits, options["top_k"])
        group_size = num_experts // num_groups
        block_groups = triton.next_power_of_2(num_groups)
        block_members = triton.next_power_of_2(group_size)
        launch_rows(
            _grouped_sigmoid_topk_forward, router_logits, block_groups * block_members,
            router_logits, bias, weights, ids, num_tokens, *router_logits.stride(), *bias.stride(),
            num_groups=num_groups, group_size=group_size, topk_groups=topk_groups, **options,
            BLOCK_GROUPS=block_groups, BLOCK_MEMBERS=block_members,
            BLOCK_TOP_K=triton.next_power_of_2(options["top_k"]),
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, router_logits)
        ctx.options = options
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        return _grad_logits(_grouped_sigmoid_topk_backward, ctx, grad_weights), None, None, None, None


def softmax_topk(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` most probable experts of each token: `reference.torch.routers.softmax_topk`, fused.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides.
        top_k: Experts per token, 1 to num_experts.
        renormalize: Whether the weights of a token sum to 1.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits); differentiable once.
        topk_ids: [num_tokens, top_k], int64, by descending probability; NaN highest, of equals the lower id.

    Raises:
        TypeError: `router_logits` is not a floating array, or `top_k` not an integer.
        ValueError: `router_logits` is not of rank 2 or where Triton runs, or `top_k` not in 1..num_experts.

    Source: Mixtral of Experts (arXiv:2401.04088), section 2.1, renormalized; OLMoE (arXiv:2409.02060),
    section 2, not renormalized.
    """
    validation.softmax_topk(router_logits, top_k)
    require_triton_device("router_logits", router_logits)
    return _SoftmaxTopk.apply(router_logits, {"top_k": int(top_k), "renormalize": bool(renormalize)})


def grouped_sigmoid_topk(
    router_logits: torch.Tensor,
    e_score_correction_bias: torch.Tensor,
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts from the best groups: `reference.torch.routers.grouped_sigmoid_topk`, fused.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides.
        e_score_correction_bias: [num_experts], floating, any stride; for the choice only, without gradient.
        top_k: Experts per token, 1 to topk_groups * num_experts / num_groups.
        num_groups: Groups of consecutive experts; divides num_experts.
        topk_groups: Groups a token may choose from, 1 to num_groups.
        renormalize: Whether the weights of a token sum to routed_scaling_factor.
        routed_scaling_factor: Multiplies every weight; a constant of the compiled kernel.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits); differentiable once.
        topk_ids: [num_tokens, top_k], int64, by descending biased score; NaN highest, of equals the lower id.

    Raises:
        TypeError: `router_logits` or `e_score_correction_bias` is not a floating array, or an option is of another kind.
        ValueError: A rank, size or device is wrong, `num_groups` does not divide num_experts, or
            `topk_groups` or `top_k` is more than there is to choose from, or `routed_scaling_factor` is not finite.

    Source: DeepSeek-V3 Technical Report (arXiv:2412.19437), section 2.1.2; the 1e-20 is of the public model's
    `MoEGate`.
    """
    validation.grouped_sigmoid_topk(router_logits, e_score_correction_bias, top_k, num_groups, topk_groups, routed_scaling_factor)
    require_triton_device("router_logits", router_logits)
    options = {
        "top_k": int(top_k),
        "renormalize": bool(renormalize),
        "routed_scaling_factor": float(routed_scaling_factor),
    }
    # detached, else a bias that asks for a gradient makes the weights ask for one
    bias = e_score_correction_bias.detach()
    return _GroupedSigmoidTopk.apply(router_logits, bias, int(num_groups), int(topk_groups), options)
