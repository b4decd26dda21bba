"""Routers that choose by noisy logits, fused: noise, scores, selection and weights without a trip to memory between them.

One kernel forward and one backward per router, over whole rows of experts as in the routers without noise. Forward reads
logits and draws once, and the logits (and draws) of the chosen again, from the cache. Backward reads what forward wrote, no
logits: of `noisy_topk` the weights and, where chosen, what made the noise; of `ste_topk` both kinds of probabilities and their
gradients. All are bound by memory, but for a large top_k.

The deviation of annealed noise is an argument, not a constant, of the compiled kernel: it is another one at each step.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.arithmetic import divide, exponentials_of, through_softmax
from gaugeblock.optimized.triton.launch import program_rows, require_triton_device
from gaugeblock.optimized.triton.routing import empty_choice, launch_rows, load_grads, load_logits, store_choice
from gaugeblock.optimized.triton.topk import choose_lanes, keys_of
from gaugeblock.reference import validation
from gaugeblock.reference.torch.precision import at_least_float32

EPSILON = tl.constexpr(1e-9)


@triton.jit
def _softplus(x):
    """ln(1 + e^x); where e^x is small, e^x itself: what 1 + e^x has lost is divided out again."""
    exponentials = tl.exp(-tl.abs(x))
    more_than_1 = 1.0 + exponentials
    lost = divide(exponentials, more_than_1 - 1.0)
    return tl.maximum(x, 0.0) + tl.where(more_than_1 == 1.0, exponentials, tl.log(more_than_1) * lost)


@triton.jit
def _load_noisy(
    logits_ptr, noise_logits_ptr, noise_ptr, row_stride, column_stride, noise_logits_row_stride, noise_logits_column_stride,
    noise_row_stride, noise_column_stride, rows, experts, mask, dtype: tl.constexpr,
):  # fmt: skip
    """Return h[rows, experts], 0 where masked."""
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, mask, dtype)
    noise_logits = load_logits(noise_logits_ptr, noise_logits_row_stride, noise_logits_column_stride, rows, experts, mask, dtype)
    noise = load_logits(noise_ptr, noise_row_stride, noise_column_stride, rows, experts, mask, dtype)
    return logits + noise * _softplus(noise_logits)


@triton.jit(do_not_specialize=["num_tokens"])
def _noisy_topk_forward(
    logits_ptr, noise_logits_ptr, noise_ptr, weights_ptr, ids_ptr, num_tokens, row_stride, column_stride,
    noise_logits_row_stride, noise_logits_column_stride, noise_row_stride, noise_column_stride,
    num_experts: tl.constexpr, top_k: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_TOP_K: tl.constexpr,
):  # fmt: skip
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    dtype = weights_ptr.dtype.element_ty
    noisy = _load_noisy(
        logits_ptr, noise_logits_ptr, noise_ptr, row_stride, column_stride, noise_logits_row_stride, noise_logits_column_stride,
        noise_row_stride, noise_column_stride, rows, experts, in_batch & exists, dtype,
    )  # fmt: skip
    ids = choose_lanes(keys_of(noisy, exists), top_k, BLOCK_TOP_K)
    columns = tl.arange(0, BLOCK_TOP_K)[None, :]
    is_column = columns < top_k
    chosen = _load_noisy(
        logits_ptr, noise_logits_ptr, noise_ptr, row_stride, column_stride, noise_logits_row_stride, noise_logits_column_stride,
        noise_row_stride, noise_column_stride, rows, ids, in_batch & is_column, dtype,
    )  # fmt: skip
    chosen = tl.where(is_column, chosen, float("-inf"))
    exponentials = tl.exp(chosen - tl.max(chosen, axis=1)[:, None])
    weights = divide(exponentials, tl.sum(exponentials, axis=1)[:, None])
    store_choice(weights_ptr, ids_ptr, weights, ids, rows, in_batch, columns, top_k)


@triton.jit(do_not_specialize=["num_tokens"])
def _noisy_topk_backward(
    grad_weights_ptr, weights_ptr, ids_ptr, noise_logits_ptr, noise_ptr, grad_logits_ptr, grad_noise_logits_ptr,
    num_tokens, grad_row_stride, grad_column_stride, noise_logits_row_stride, noise_logits_column_stride,
    noise_row_stride, noise_column_stride,
    num_experts: tl.constexpr, top_k: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dh = w * (dw - sum(w * dw)) where chosen; the logits of the noise get dh * noise * sigmoid(noise_logits)."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    dtype = grad_weights_ptr.dtype.element_ty
    is_chosen, grads = load_grads(grad_weights_ptr, grad_row_stride, grad_column_stride, ids_ptr, rows, in_batch, experts, top_k)
    _, weights = load_grads(weights_ptr, top_k, 1, ids_ptr, rows, in_batch, experts, top_k)
    grads = through_softmax(weights, grads)
    offsets, mask = rows * num_experts + experts, in_batch & (experts < num_experts)
    tl.store(grad_logits_ptr + offsets, grads, mask=mask)

    noise_logits = load_logits(
        noise_logits_ptr, noise_logits_row_stride, noise_logits_column_stride, rows, experts, mask & is_chosen, dtype
    )
    noise = load_logits(noise_ptr, noise_row_stride, noise_column_stride, rows, experts, mask & is_chosen, dtype)
    tl.store(grad_noise_logits_ptr + offsets, grads * noise * tl.sigmoid(noise_logits), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _ste_topk_forward(
    logits_ptr, noise_ptr, weights_ptr, ids_ptr, probs_ptr, clean_ptr, entropy_ptr, num_tokens, row_stride, column_stride,
    noise_row_stride, noise_column_stride, noise_std,
    num_experts: tl.constexpr, top_k: tl.constexpr, training: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_TOP_K: tl.constexpr,
):  # fmt: skip
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    exists = experts < num_experts
    mask = in_batch & exists
    dtype = weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, mask, dtype)
    offsets = rows * num_experts + experts
    exponentials, total, highest = exponentials_of(tl.where(exists, logits, float("-inf")))
    probs = divide(exponentials, total)
    tl.store(clean_ptr + offsets, probs, mask=mask)
    entropy = -tl.sum(probs * tl.log(probs + EPSILON), axis=1)[:, None]
    tl.store(entropy_ptr + rows, entropy, mask=in_batch)
    if training:
        noise = load_logits(noise_ptr, noise_row_stride, noise_column_stride, rows, experts, mask, dtype)
        logits += noise_std * noise
        exponentials, total, highest = exponentials_of(tl.where(exists, logits, float("-inf")))
        probs = divide(exponentials, total)
    tl.store(probs_ptr + offsets, probs, mask=mask)

    # probabilities are in the order of their logits, and underflow makes no logits equal
    ids = choose_lanes(keys_of(logits, exists), top_k, BLOCK_TOP_K)
    columns = tl.arange(0, BLOCK_TOP_K)[None, :]
    is_column = columns < top_k
    mask = in_batch & is_column
    chosen_logits = load_logits(logits_ptr, row_stride, column_stride, rows, ids, mask, dtype)
    if training:
        chosen_logits += noise_std * load_logits(noise_ptr, noise_row_stride, noise_column_stride, rows, ids, mask, dtype)
    chosen = tl.where(is_column, divide(tl.exp(chosen_logits - highest), total), 0.0)
    if top_k > 1:
        weights = divide(chosen, (tl.sum(chosen, axis=1) + EPSILON)[:, None])
    elif training:
        weights = 1.0 + (chosen - chosen)  # NaN of NaN
    else:
        weights = tl.full(chosen.shape, 1.0, dtype)
    store_choice(weights_ptr, ids_ptr, weights, ids, rows, in_batch, columns, top_k)


@triton.jit(do_not_specialize=["num_tokens"])
def _ste_topk_backward(
    grad_weights_ptr, grad_probs_ptr, grad_clean_ptr, grad_entropy_ptr, ids_ptr, probs_ptr, clean_ptr, grad_logits_ptr,
    num_tokens, grad_row_stride, grad_column_stride, grad_probs_row_stride, grad_probs_column_stride,
    grad_clean_row_stride, grad_clean_column_stride, grad_entropy_stride,
    num_experts: tl.constexpr, top_k: tl.constexpr, training: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Add up the gradients of two softmaxes, with noise and without."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    mask = in_batch & (experts < num_experts)
    dtype = grad_weights_ptr.dtype.element_ty
    offsets = rows * num_experts + experts
    probs = tl.load(probs_ptr + offsets, mask=mask, other=0.0)
    grads = load_logits(grad_probs_ptr, grad_probs_row_stride, grad_probs_column_stride, rows, experts, mask, dtype)
    is_chosen, of_weights = load_grads(
        grad_weights_ptr, grad_row_stride, grad_column_stride, ids_ptr, rows, in_batch, experts, top_k
    )
    if top_k > 1:
        chosen = tl.where(is_chosen, probs, 0.0)
        total = (tl.sum(chosen, axis=1) + EPSILON)[:, None]
        inner = divide(tl.sum(chosen * of_weights, axis=1)[:, None], total)
        grads += tl.where(is_chosen, divide(of_weights - inner, total), 0.0)
    elif training:
        grads += of_weights
    grad_logits = through_softmax(probs, grads)

    clean = tl.load(clean_ptr + offsets, mask=mask, other=0.0)
    grads = load_logits(grad_clean_ptr, grad_clean_row_stride, grad_clean_column_stride, rows, experts, mask, dtype)
    of_entropy = tl.load(grad_entropy_ptr + rows * grad_entropy_stride, mask=in_batch, other=0.0)
    grads -= of_entropy * (tl.log(clean + EPSILON) + divide(clean, clean + EPSILON))
    tl.store(grad_logits_ptr + offsets, grad_logits + through_softmax(clean, grads), mask=mask)


class _NoisyTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, router_logits: torch.Tensor, noise_logits: torch.Tensor, noise: torch.Tensor, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = router_logits.shape
        weights, ids = empty_choice(router_logits, top_k)
        block_experts = triton.next_power_of_2(num_experts)
        launch_rows(
            _noisy_topk_forward, router_logits, block_experts,
            router_logits, noise_logits, noise, weights, ids,
            num_tokens, *router_logits.stride(), *noise_logits.stride(), *noise.stride(),
            num_experts=num_experts, top_k=top_k,
            BLOCK_EXPERTS=block_experts, BLOCK_TOP_K=triton.next_power_of_2(top_k),
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(weights, ids, noise_logits, noise)
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        weights, ids, noise_logits, noise = ctx.saved_tensors
        num_tokens, num_experts = noise_logits.shape
        grad_logits, grad_noise_logits = (noise_logits.new_empty((num_tokens, num_experts)) for _ in range(2))
        launch_rows(
            _noisy_topk_backward, noise_logits, triton.next_power_of_2(num_experts),
            grad_weights, weights, ids, noise_logits, noise, grad_logits, grad_noise_logits,
            num_tokens, *grad_weights.stride(), *noise_logits.stride(), *noise.stride(),
            num_experts=num_experts, top_k=ids.shape[1], BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
        )  # fmt: skip
        return grad_logits, grad_noise_logits, None, None


class _SteTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, noise: torch.Tensor, noise_std: float, options: dict[str, Any]
    ) -> tuple[torch.Tensor, ...]:
        num_tokens, num_experts = logits.shape
        weights, ids = empty_choice(logits, options["top_k"])
        probs, clean = (weights.new_empty((num_tokens, num_experts)) for _ in range(2))
        entropy = weights.new_empty(num_tokens)
        block_experts = triton.next_power_of_2(num_experts)
        launch_rows(
            _ste_topk_forward, logits, block_experts,
            logits, noise, weights, ids, probs, clean, entropy,
            num_tokens, *logits.stride(), *noise.stride(), noise_std,
            num_experts=num_experts, **options,
            BLOCK_EXPERTS=block_experts, BLOCK_TOP_K=triton.next_power_of_2(options["top_k"]),
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, probs, clean)
        ctx.options = options
        return weights, ids, probs, clean, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_weights: torch.Tensor,
        _: Any,
        grad_probs: torch.Tensor,
        grad_clean: torch.Tensor,
        grad_entropy: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        ids, probs, clean = ctx.saved_tensors
        num_tokens, num_experts = probs.shape
        grad_logits = torch.empty_like(probs)
        launch_rows(
            _ste_topk_backward, probs, triton.next_power_of_2(num_experts),
            grad_weights, grad_probs, grad_clean, grad_entropy, ids, probs, clean, grad_logits,
            num_tokens, *grad_weights.stride(), *grad_probs.stride(), *grad_clean.stride(), *grad_entropy.stride(),
            num_experts=num_experts, **ctx.options, BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
        )  # fmt: skip
        return grad_logits, None, None, None


def noisy_topk(
    router_logits: torch.Tensor, noise_logits: torch.Tensor, noise: torch.Tensor, *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` experts of highest noisy logit: `reference.torch.noisy_routers.noisy_topk`, fused.

    Args:
        router_logits: [num_tokens, num_experts], any floating dtype, any strides.
        noise_logits: [num_tokens, num_experts], of the dtype of router_logits, any strides.
        noise: [num_tokens, num_experts], any floating dtype, any strides; without gradient.
        top_k: Experts per token, 1 to num_experts.

    Returns:
        topk_weights: [num_tokens, top_k], float32 (float64 for float64 logits); differentiable once.
        topk_ids: [num_tokens, top_k], int64, by descending noisy logit; NaN highest, of equals the lower id.

    Raises:
        TypeError: An array is not of the dtype above, or `top_k` not an integer.
        ValueError: A rank, size or device is wrong, `top_k` is not in 1..num_experts, or Triton cannot run on the device.

    Source: Outrageously Large Neural Networks (arXiv:1701.06538), section 2.1, equations 3 to 5.
    """
    validation.noisy_topk(router_logits, noise_logits, noise, top_k)
    require_triton_device("router_logits", router_logits)
    # detached, else noise that asks for a gradient makes the weights ask for one
    return _NoisyTopk.apply(router_logits, noise_logits, noise.detach(), int(top_k))


def ste_topk(
    router_logits: torch.Tensor, noise: torch.Tensor, *, top_k: int, noise_std: float, training: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose experts by noisy probabilities, with a straight-through weight: `reference.torch.noisy_routers.ste_topk`, fused.

    Args:
        router_logits: [num_tokens, num_experts], any strides, or [batch_size, sequence_length, num_experts], which is
            copied unless it can be viewed as the former; any floating dtype.
        noise: Of the shape of router_logits, any floating dtype; without gradient.
        top_k: Experts per token, 1 to num_experts.
        noise_std: Deviation of the noise; 0 or more, rounded to float32.
        training: Whether there is noise, and a gradient through the weight of one expert alone.

    Returns:
        All but the ids in float32 (float64 for float64 logits), and differentiable once:
        topk_weights: [num_tokens, top_k].
        topk_ids: [num_tokens, top_k], int64, by descending noisy logit; NaN highest, of equals the lower id.
        router_probs, router_probs_clean, router_logits: [num_tokens, num_experts].
        entropy: [num_tokens].

    Raises:
        TypeError: `router_logits` or `noise` is not a floating array, or an option is of another kind.
        ValueError: A rank, size or device is wrong, `top_k` is not in 1..num_experts, `noise_std` is negative or not finite,
            or Triton cannot run on the device.

    Source: sumitdotml/moe-emergence, `moe_emergence/moe.py`.
    """
    validation.ste_topk(router_logits, noise, top_k, noise_std)
    require_triton_device("router_logits", router_logits)
    num_experts = router_logits.shape[-1]
    # in float32 before the kernel, so that the gradients of the kernel and of these logits are added up there, and rounded once
    logits = at_least_float32(router_logits).reshape(-1, num_experts)
    options = {"top_k": int(top_k), "training": bool(training)}
    choice = _SteTopk.apply(logits, noise.detach().reshape(-1, num_experts), float(noise_std), options)
    weights, ids, probs, probs_clean, entropy = choice
    return weights, ids, probs, probs_clean, logits, entropy
