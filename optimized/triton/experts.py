"""Experts over routed rows, of the kernels of `expert_passes.py`: they differ in what happens between their two products."""

from functools import partial
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.activations import Activation, Nonlinearity
from gaugeblock.optimized.triton.dispatch import sum_rows
from gaugeblock.optimized.triton.expert_passes import Plan, Saved, backward_pass, forward_pass
from gaugeblock.optimized.triton.expert_products import Expert
from gaugeblock.optimized.triton.launch import device_of, reject_float64, require_triton_device, will_differentiate
from gaugeblock.reference import validation

SWIGLU = Activation("silu")
GELU: dict[str, Nonlinearity] = {"none": "gelu", "tanh": "gelu_tanh"}


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        b1: torch.Tensor | None,
        w2: torch.Tensor,
        b2: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        out, saved = forward_pass(plan, hidden_states, Expert(w1, b1, w2, b2), topk_weights, topk_ids)
        ctx.plan = plan
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with device_of(out_gradient):
            saved = Saved(*ctx.saved_tensors)
            out_gradient = out_gradient.to(saved.hidden_states.dtype)  # operands of a product have one dtype
            hidden, *others = backward_pass(ctx.plan, ctx.needs_input_grad[1:7], out_gradient, saved)
            hidden = None if hidden is None else sum_rows(hidden, None, out_gradient.dtype)
            return None, hidden, *others, None


def _apply(
    activation: Activation,
    hidden_states: torch.Tensor,
    expert: Expert,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    batch_invariant: bool,
    recompute: bool,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Look at what validation leaves to kernels, and launch them."""
    for name, tensor in (("hidden_states", hidden_states), ("topk_weights", topk_weights)):
        reject_float64(name, tensor)
    validation.expert_ids_in_range(topk_ids, num_experts=expert.w1.shape[0])
    require_triton_device("hidden_states", hidden_states)
    with device_of(hidden_states):
        keep = not recompute and will_differentiate(hidden_states, *expert, topk_weights)
        plan = Plan(activation, batch_invariant, keep, out_dtype)
        return _Experts.apply(plan, hidden_states, *expert, topk_weights, topk_ids)


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    batch_invariant: bool = True,
    recompute: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Products are added up in float32, those of float32 inputs exact (no tf32). The activation is rounded to
    the dtype of hidden_states before it is multiplied by w2; so are, backward, topk_weights * activation and the
    gradients of the first product. Any strides will do. Differentiable once, in all but topk_ids.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows; same dtype.
        w2: [num_experts, hidden_size, intermediate_size]; same dtype.
        topk_weights: [num_tokens, top_k], bfloat16, float16 or float32.
        topk_ids: [num_tokens, top_k], integer, each in 0..num_experts - 1. An id given twice counts twice.
        batch_invariant: Whether a token's bits must not depend on its batch; if not, tiles are chosen by its rows too.
        recompute: Whether the backward pass computes the pre-activations again; if not, the forward pass keeps them.
        out_dtype: Of the result; None for that of hidden_states. A layer that adds more to it takes float32.

    Returns:
        [num_tokens, hidden_size], of `out_dtype`.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or Triton cannot run
            on the device.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`.
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    how: dict[str, Any] = {"batch_invariant": batch_invariant, "recompute": recompute, "out_dtype": out_dtype}
    return _apply(SWIGLU, hidden_states, Expert(w13, None, w2, None), topk_weights, topk_ids, **how)


fused_swiglu_fast = partial(fused_swiglu, batch_invariant=False)
fused_swiglu_recomputed = partial(fused_swiglu, recompute=True)


def fused_geglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: Literal["none", "tanh"],
    batch_invariant: bool = True,
    recompute: bool = False,
) -> torch.Tensor:
    """Apply the chosen GEGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (gelu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Products are added up in float32, those of float32 inputs exact (no tf32). The activation is rounded to
    the dtype of hidden_states before it is multiplied by w2; so are, backward, topk_weights * activation and the
    gradients of the first product. Any strides will do. Differentiable once, in all but topk_ids.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows; same dtype.
        w2: [num_experts, hidden_size, intermediate_size]; same dtype.
        topk_weights: [num_tokens, top_k], bfloat16, float16 or float32.
        topk_ids: [num_tokens, top_k], integer, each in 0..num_experts - 1. An id given twice counts twice.
        approximate: "none" for the exact GELU, "tanh" for its approximation.
        batch_invariant: Whether a token's bits must not depend on its batch; if not, tiles are chosen by its rows too.
        recompute: Whether the backward pass computes the pre-activations again; if not, the forward pass keeps them.

    Returns:
        [num_tokens, hidden_size], dtype of hidden_states.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or an option is not of its type.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, `approximate` is no form of GELU,
            or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.experts.fused_geglu`.
    """
    validation.fused_geglu(hidden_states, w13, w2, topk_weights, topk_ids, approximate)
    activation, expert = Activation(GELU[approximate]), Expert(w13, None, w2, None)
    return _apply(activation, hidden_states, expert, topk_weights, topk_ids, batch_invariant=batch_invariant, recompute=recompute)


def fused_gelu_mlp(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: Literal["none", "tanh"],
    batch_invariant: bool = True,
    recompute: bool = False,
) -> torch.Tensor:
    """Apply the chosen GELU experts, which have biases, to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * (w2[e] @ gelu(w1[e] @ hidden_states[t] + b1[e]) + b2[e]),  e = topk_ids[t, j]

    Products are added up in float32, those of float32 inputs exact (no tf32). The activation is rounded to
    the dtype of hidden_states before it is multiplied by w2; so are, backward, topk_weights * activation and the
    gradients of the first product. Any strides will do. Differentiable once, in all but topk_ids.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w1: [num_experts, intermediate_size, hidden_size]; same dtype.
        b1: [num_experts, intermediate_size]; same dtype.
        w2: [num_experts, hidden_size, intermediate_size]; same dtype.
        b2: [num_experts, hidden_size]; same dtype.
        topk_weights: [num_tokens, top_k], bfloat16, float16 or float32.
        topk_ids: [num_tokens, top_k], integer, each in 0..num_experts - 1. An id given twice counts twice.
        approximate: "none" for the exact GELU, "tanh" for its approximation.
        batch_invariant: Whether a token's bits must not depend on its batch; if not, tiles are chosen by its rows too.
        recompute: Whether the backward pass computes the pre-activations again; if not, the forward pass keeps them.

    Returns:
        [num_tokens, hidden_size], dtype of hidden_states.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or an option is not of its type.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, `approximate` is no form of GELU,
            or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.experts.fused_gelu_mlp`.
    """
    validation.fused_gelu_mlp(hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, approximate)
    activation, expert = Activation(GELU[approximate], gated=False), Expert(w1, b1, w2, b2)
    return _apply(activation, hidden_states, expert, topk_weights, topk_ids, batch_invariant=batch_invariant, recompute=recompute)


def fused_swiglu_oai(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    b13: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    alpha: float,
    limit: float,
    batch_invariant: bool = True,
    recompute: bool = False,
) -> torch.Tensor:
    """Apply the chosen experts of gpt-oss to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * (w2[e] @ (g * sigmoid(alpha * g) * (u + 1)) + b2[e]),  e = topk_ids[t, j]
        g = min(gate, limit), u = up clamped to -limit..limit;  gate, up = even, odd rows of w13[e] @ hidden_states[t] + b13[e]

    Products are added up in float32, those of float32 inputs exact (no tf32). The activation is rounded to
    the dtype of hidden_states before it is multiplied by w2; so are, backward, topk_weights * activation and the
    gradients of the first product. Any strides will do. Differentiable once, in all but topk_ids.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate and up rows in turn; same dtype.
        b13: [num_experts, 2 * intermediate_size], in turn too; same dtype.
        w2: [num_experts, hidden_size, intermediate_size]; same dtype.
        b2: [num_experts, hidden_size]; same dtype.
        topk_weights: [num_tokens, top_k], bfloat16, float16 or float32.
        topk_ids: [num_tokens, top_k], integer, each in 0..num_experts - 1. An id given twice counts twice.
        alpha: Slope of the sigmoid, 1.702 in gpt-oss.
        limit: Where gate and up are clamped, 7 in gpt-oss.
        batch_invariant: Whether a token's bits must not depend on its batch; if not, tiles are chosen by its rows too.
        recompute: Whether the backward pass computes the pre-activations again; if not, the forward pass keeps them.

    Returns:
        [num_tokens, hidden_size], dtype of hidden_states.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or an option is not of its type.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or Triton cannot run
            on the device.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu_oai`.
    """
    validation.fused_swiglu_oai(hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, alpha, limit)
    activation = Activation("clamped", interleaved=True, alpha=alpha, limit=limit)
    expert = Expert(w13, b13, w2, b2)
    return _apply(activation, hidden_states, expert, topk_weights, topk_ids, batch_invariant=batch_invariant, recompute=recompute)


fused_swiglu_oai_fast = partial(fused_swiglu_oai, batch_invariant=False)
