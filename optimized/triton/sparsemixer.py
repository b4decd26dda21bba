"""SparseMixer, fused: two choices, and the softmax of each among the logits that are near it, in one kernel; backward in another.

Forward reads the logits and writes 24 bytes a token; backward reads logits, ids and two gradients and writes the gradient of
the logits. A program has whole rows, as in `routing.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.arithmetic import divide
from gaugeblock.optimized.triton.launch import program_rows, require_triton_device
from gaugeblock.optimized.triton.routing import empty_choice, launch_rows, load_logits
from gaugeblock.optimized.triton.topk import choose_lanes, keys_of
from gaugeblock.reference import validation


@triton.jit
def _probabilities_near(logits, others, is_chosen, threshold):
    """Return the softmax of the logits in `others` that lie near the chosen one, 0 elsewhere."""
    highest = tl.sum(tl.where(is_chosen, logits, 0.0), axis=1)[:, None]
    scale = tl.maximum(tl.abs(logits), tl.broadcast_to(highest, logits.shape), propagate_nan=tl.PropagateNan.ALL)
    is_far = divide(highest - logits, scale) > threshold  # 0 / 0 is not
    exponentials = tl.where(others & ~is_far, tl.exp(logits - highest), 0.0)
    return divide(exponentials, tl.sum(exponentials, axis=1)[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _forward(
    logits_ptr, weights_ptr, ids_ptr, num_tokens, row_stride, column_stride,
    num_experts: tl.constexpr, threshold: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    others = tl.broadcast_to(experts < num_experts, (BLOCK_TOKENS, BLOCK_EXPERTS))
    dtype = weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & others, dtype)
    for choice in tl.static_range(2):
        id = choose_lanes(keys_of(logits, others), 1, 1)
        is_chosen = experts == id
        weight = tl.sum(tl.where(is_chosen, _probabilities_near(logits, others, is_chosen, threshold), 0.0), axis=1)[:, None]
        tl.store(weights_ptr + rows * 2 + choice, weight, mask=in_batch)
        tl.store(ids_ptr + rows * 2 + choice, id.to(tl.int64), mask=in_batch)
        others = others & (experts != id)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward(
    grad_weights_ptr, ids_ptr, logits_ptr, grad_logits_ptr, num_tokens, grad_row_stride, grad_column_stride,
    row_stride, column_stride,
    num_experts: tl.constexpr, threshold: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """dx = sum over both choices of dw * p * (1 at the chosen - p[chosen])."""
    rows = program_rows(BLOCK_TOKENS)[:, None]
    in_batch = rows < num_tokens
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    others = tl.broadcast_to(experts < num_experts, (BLOCK_TOKENS, BLOCK_EXPERTS))
    dtype = grad_weights_ptr.dtype.element_ty
    logits = load_logits(logits_ptr, row_stride, column_stride, rows, experts, in_batch & others, dtype)
    grads = tl.zeros_like(logits)
    for choice in tl.static_range(2):
        id = tl.load(ids_ptr + rows * 2 + choice, mask=in_batch, other=0).to(tl.int32)
        is_chosen = experts == id
        grad = tl.load(grad_weights_ptr + rows * grad_row_stride + choice * grad_column_stride, mask=in_batch, other=0.0)
        probabilities = _probabilities_near(logits, others, is_chosen, threshold)
        # what the chosen lacks to 1 is the sum of the others: 1 - p has no digits left where p is near 1
        rest = tl.where(is_chosen, 0.0, probabilities)
        of_rest = tl.sum(rest, axis=1)[:, None]
        weight = tl.sum(tl.where(is_chosen, probabilities, 0.0), axis=1)[:, None]
        grads += grad * weight * tl.where(is_chosen, of_rest, -rest)
        others = others & (experts != id)
    tl.store(grad_logits_ptr + rows * num_experts + experts, grads, mask=in_batch & (experts < num_experts))


class _SparseMixer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, router_logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, num_experts = router_logits.shape
        weights, ids = empty_choice(router_logits, 2)
        lanes = triton.next_power_of_2(num_experts)
        launch_rows(
            _forward, router_logits, lanes, router_logits, weights, ids, num_tokens, *router_logits.stride(),
            num_experts=num_experts, threshold=threshold, BLOCK_EXPERTS=lanes,
        )  # fmt: skip
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, router_logits)
        ctx.threshold = threshold
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        ids, router_logits = ctx.saved_tensors
        num_tokens, num_experts = router_logits.shape
        grad_logits = router_logits.new_empty((num_tokens, num_experts))
        lanes = triton.next_power_of_2(num_experts)
        launch_rows(
            _backward, router_logits, lanes, grad_weights, ids, router_logits, grad_logits, num_tokens,
            *grad_weights.stride(), *router_logits.stride(),
            num_experts=num_experts, threshold=ctx.threshold, BLOCK_EXPERTS=lanes,
        )  # fmt: skip
        return grad_logits, None


def sparsemixer(router_logits: torch.Tensor, *, jitter_eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.routers.sparsemixer`; ids are NaN highest, of equals the lower id."""
    validation.sparsemixer(router_logits, jitter_eps)
    require_triton_device("router_logits", router_logits)
    return _SparseMixer.apply(router_logits, 2 * float(jitter_eps))
