"""The expert that all tokens pass: one expert of those in `expert_passes.py`, whom every token chooses."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.dispatch import sum_rows
from gaugeblock.optimized.triton.expert_passes import Plan, Saved, backward_pass, forward_pass
from gaugeblock.optimized.triton.expert_products import Expert
from gaugeblock.optimized.triton.experts import SWIGLU
from gaugeblock.optimized.triton.launch import device_of, reject_float64, require_triton_device, will_differentiate
from gaugeblock.reference import validation


class _Shared(torch.autograd.Function):
    """One function for the gate and the expert, so that their gradients of a token are added up before they are rounded."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, shared_gate: torch.Tensor | None
    ) -> torch.Tensor:
        everyone = torch.zeros(len(hidden_states), 1, dtype=torch.int64, device=hidden_states.device)
        weights = torch.ones(len(hidden_states), 1, device=hidden_states.device)
        if shared_gate is not None:
            weights = torch.sigmoid(hidden_states.float() @ shared_gate.float().mT)
        expert = Expert(w13[None], None, w2[None], None)
        out, saved = forward_pass(plan, hidden_states, expert, weights, everyone)
        ctx.plan = plan
        ctx.save_for_backward(*saved, shared_gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *of_expert, shared_gate = ctx.saved_tensors
        saved = Saved(*of_expert)
        _, needs_hidden, needs_w13, needs_w2, needs_gate = ctx.needs_input_grad
        through_gate = shared_gate is not None and (needs_hidden or needs_gate)
        needed = (needs_hidden, needs_w13, False, needs_w2, False, through_gate)
        out_gradient = out_gradient.to(saved.hidden_states.dtype)
        with device_of(out_gradient):
            rows, w13_gradient, _, w2_gradient, _, weights_gradient = backward_pass(ctx.plan, needed, out_gradient, saved)
        hidden_gradient = None if rows is None else sum_rows(rows, None, torch.float32)
        gate_gradient = None
        if weights_gradient is not None:
            logits_gradient = weights_gradient * saved.topk_weights * (1 - saved.topk_weights)
            if hidden_gradient is not None:
                hidden_gradient += logits_gradient * shared_gate.float()
            if needs_gate:
                gate_gradient = (logits_gradient.mT @ saved.hidden_states.float()).to(shared_gate.dtype)
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(out_gradient.dtype)
        w13_gradient, w2_gradient = (None if each is None else each[0] for each in (w13_gradient, w2_gradient))
        return None, hidden_gradient, w13_gradient, w2_gradient, gate_gradient


def _launch(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    shared_gate: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    reject_float64("hidden_states", hidden_states)
    require_triton_device("hidden_states", hidden_states)
    with device_of(hidden_states):
        plan = Plan(SWIGLU, True, will_differentiate(hidden_states, w13, w2, shared_gate), out_dtype)
        return _Shared.apply(plan, hidden_states, w13, w2, shared_gate)


def shared_swiglu(
    hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, *, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Apply the SwiGLU expert that all tokens pass: `reference.torch.experts.shared_swiglu`.

    Rounding as in `experts.fused_swiglu`. Any strides will do. Differentiable once.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w13: [2 * intermediate_size, hidden_size], gate rows, then up rows; same dtype.
        w2: [hidden_size, intermediate_size]; same dtype.
        out_dtype: Of the result; None for that of hidden_states. A layer that adds more to it takes float32.

    Returns:
        [num_tokens, hidden_size], of `out_dtype`.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.experts.shared_swiglu`.
    """
    validation.shared_swiglu(hidden_states, w13, w2)
    return _launch(hidden_states, w13, w2, None, out_dtype)


def gated_shared_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    shared_gate: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Apply the SwiGLU expert that all tokens pass, as far as a gate is open: `reference.torch.experts.gated_shared_swiglu`.

    The gate is torch's, in float32; the rest is `shared_swiglu`. Any strides will do. Differentiable once.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        w13: [2 * intermediate_size, hidden_size], gate rows, then up rows; same dtype.
        w2: [hidden_size, intermediate_size]; same dtype.
        shared_gate: [1, hidden_size]; same dtype.
        out_dtype: As of `shared_swiglu`.

    Returns:
        [num_tokens, hidden_size], of `out_dtype`.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.experts.gated_shared_swiglu`.
    """
    validation.gated_shared_swiglu(hidden_states, w13, w2, shared_gate)
    return _launch(hidden_states, w13, w2, shared_gate, out_dtype)
