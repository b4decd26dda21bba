"""Fused SwiGLU experts in PyTorch on the CPU: rows sorted by expert, each expert's rows together.

Few rows for each expert are bound by reading weights, many by the products. What the speed comes from, measured on 2 cores with
MKL on an AMD EPYC:

- A product with weights is a batched one, with a part of the weights for each thread, since MKL divides a product of few rows
  badly: 8 rows for each of 64 experts of 512 x 512 take 8.5 ms, with one product for each expert 17.7. Both products are divided
  along intermediate_size, so that all between them stays in parts. The second one leaves a summand for each part.
- What is done element by element is done for a batch of experts at once. With 256 experts and 64 tokens, calls for each expert
  were half of the time.
- One batch after the other borrows the same memory, since fresh memory costs page faults. Gradients of weights are not asked
  for as huge pages: where a virtual machine gives free ones back to its host, 1 GB takes 1.3 s to write again, in small ones 0.3.
- The routing weight scales the activation (I wide), not the expert's output (H wide).
- The gradients of the weights are written where they stay; autograd of `w13[e]` would add up E of full size.

A token's sum over its experts runs in the order of the experts: the same bits in every run. They depend on how many tokens share
an expert, since MKL picks its kernel by the size of the product.

Shapes: those of `expert_rows.py`; H hidden_size.
"""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.compiled.expert_rows import Routes, Scratch, gradient_of, routes_in_parts
from gaugeblock.reference import validation


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype. Any strides.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows.
        w2: [num_experts, hidden_size, intermediate_size].
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.
        out_dtype: Of the result; None for that of hidden_states. A layer that adds more to it takes float32.

    Returns:
        [num_tokens, hidden_size], of `out_dtype`; computed in float32 (float64 for float64 inputs)
        and rounded once, as is each gradient. Differentiable once, by every floating argument.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or an id names no expert.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`.
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    inputs = (hidden_states, w13, w2, topk_weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return _FusedSwiGLU.apply(*inputs, topk_ids, out_dtype)
    return _forward(hidden_states, w13, w2, _routes(topk_weights, topk_ids, w2), out_dtype)


class _FusedSwiGLU(torch.autograd.Function):
    """Keeps gate and up of every row; gathers and activates again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        out_dtype: torch.dtype | None,
    ) -> torch.Tensor:
        ctx.routes = _routes(topk_weights, topk_ids, w2)
        kept = tuple(w2.new_empty(topk_ids.numel(), w2.shape[2], dtype=_accurate_dtype(w2)) for _ in range(2))
        out = _forward(hidden_states, w13, w2, ctx.routes, out_dtype, kept)
        ctx.save_for_backward(hidden_states, w13, w2, topk_weights, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, w13, w2, topk_weights, gate_NI, up_NI = ctx.saved_tensors
        needs_hidden, needs_w13, needs_w2, needs_weights, *_ = ctx.needs_input_grad
        hidden_TH, d_out_TH = _accurate(hidden_states), _accurate(d_out)
        parts = ctx.routes.place_NS.shape[1]
        (gate_ESiH, up_ESiH), down_ESHi = _w13_in_parts(w13, parts), _w2_in_parts(w2, parts)
        d_w13 = gradient_of(w13, ctx.routes.experts) if needs_w13 else None
        d_w2 = gradient_of(w2, ctx.routes.experts) if needs_w2 else None
        d_hidden_TH = hidden_TH.new_zeros(hidden_TH.shape)
        d_topk_weights_B = hidden_TH.new_empty(ctx.routes.place_NS.numel())
        borrow = Scratch(hidden_TH)

        for batch in ctx.routes.batches:
            d_out_SnH = batch.for_all_parts(borrow.rows("d_out", d_out_TH, batch.token_R))
            d_activation_Bi = borrow("d_activation", len(batch.token_B), w2.shape[2] // parts)
            for expert, left, out in zip(batch.experts, d_out_SnH, batch.each(d_activation_Bi), strict=True):
                torch.bmm(left, _accurate(down_ESHi[expert]), out=out)

            gate_Bi, up_Bi = batch.of_all(gate_NI), batch.of_all(up_NI)
            sigmoid_Bi = torch.sigmoid(gate_Bi, out=borrow("sigmoid", *gate_Bi.shape))
            silu_Bi = torch.mul(gate_Bi, sigmoid_Bi, out=borrow("silu", *gate_Bi.shape))
            activation_Bi = torch.mul(silu_Bi, up_Bi, out=borrow("activation", *gate_Bi.shape))
            if needs_weights:
                torch.sum(d_activation_Bi * activation_Bi, 1, out=d_topk_weights_B[batch.in_parts])
            d_activation_Bi.mul_(batch.weight_B1)
            activation_Bi.mul_(batch.weight_B1)
            d_up_Bi = torch.mul(d_activation_Bi, silu_Bi, out=borrow("d_up", *gate_Bi.shape))
            d_silu_Bi = sigmoid_Bi.addcmul_(silu_Bi, 1 - sigmoid_Bi)
            d_gate_Bi = d_activation_Bi.mul_(up_Bi).mul_(d_silu_Bi)

            d_gate_Sni, d_up_Sni = batch.each(d_gate_Bi), batch.each(d_up_Bi)
            if d_w2 is not None:
                d_down_ESHi = _w2_in_parts(d_w2, parts)
                for expert, left, right in zip(batch.experts, d_out_SnH, batch.each(activation_Bi), strict=True):
                    _multiply(left.mT, right, out=d_down_ESHi[expert])
            if d_w13 is not None:
                d_gate_ESiH, d_up_ESiH = _w13_in_parts(d_w13, parts)
                hidden_SnH = batch.for_all_parts(borrow.rows("hidden", hidden_TH, batch.token_R))
                for expert, d_gate, d_up, right in zip(batch.experts, d_gate_Sni, d_up_Sni, hidden_SnH, strict=True):
                    _multiply(d_gate.mT, right, out=d_gate_ESiH[expert])
                    _multiply(d_up.mT, right, out=d_up_ESiH[expert])
            if needs_hidden:
                d_hidden_BH = borrow("d_hidden", len(batch.token_B), hidden_TH.shape[1])
                for expert, d_gate, d_up, out in zip(batch.experts, d_gate_Sni, d_up_Sni, batch.each(d_hidden_BH), strict=True):
                    torch.bmm(d_gate, _accurate(gate_ESiH[expert]), out=out)
                    out.baddbmm_(d_up, _accurate(up_ESiH[expert]))
                d_hidden_TH.index_add_(0, batch.token_B, d_hidden_BH)

        d_topk_weights = ctx.routes.sum_of_parts(d_topk_weights_B).view(topk_weights.shape) if needs_weights else None
        return d_hidden_TH.to(hidden_states.dtype) if needs_hidden else None, d_w13, d_w2, d_topk_weights, None, None


def _w13_in_parts(w13: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """Return the halves of w13, or of its gradient, [E, S, i, H] each."""
    return w13.unflatten(1, (2, parts, w13.shape[1] // 2 // parts)).unbind(1)


def _w2_in_parts(w2: torch.Tensor, parts: int) -> torch.Tensor:
    """Return w2, or its gradient, as [E, S, H, i]."""
    return w2.unflatten(2, (parts, w2.shape[2] // parts)).transpose(1, 2)


def _routes(topk_weights: torch.Tensor, topk_ids: torch.Tensor, w2: torch.Tensor) -> Routes:
    # a part for each thread, or as many as divide the width; two for one thread, so that the gate, which has one, sees parts
    parts = math.gcd(w2.shape[2], max(2, torch.get_num_threads()))
    return routes_in_parts(topk_weights.to(_accurate_dtype(w2)), topk_ids, width=w2.shape[2], parts=parts)


def _forward(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    routes: Routes,
    out_dtype: torch.dtype | None,
    keep: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """Return the output [T, H]; what comes before the activation, gate and up, [N, I] each, is written to `keep`."""
    hidden_TH = _accurate(hidden_states)
    out_TH = hidden_TH.new_zeros(hidden_TH.shape)
    parts = routes.place_NS.shape[1]
    gate_ESHi, up_ESHi, down_ESiH = (each.mT for each in (*_w13_in_parts(w13, parts), _w2_in_parts(w2, parts)))
    borrow = Scratch(hidden_TH)
    for batch in routes.batches:
        shape = len(batch.token_B), w2.shape[2] // parts
        gate_Bi, up_Bi = (batch.of_all(each) for each in keep) if keep else (borrow("gate", *shape), borrow("up", *shape))
        hidden_SnH = batch.for_all_parts(borrow.rows("hidden", hidden_TH, batch.token_R))
        for expert, left, gate, up in zip(batch.experts, hidden_SnH, batch.each(gate_Bi), batch.each(up_Bi), strict=True):
            torch.bmm(left, _accurate(gate_ESHi[expert]), out=gate)
            torch.bmm(left, _accurate(up_ESHi[expert]), out=up)

        activation_Bi = torch.sigmoid(gate_Bi, out=borrow("activation", *shape)).mul_(gate_Bi).mul_(up_Bi)
        activation_Bi.mul_(batch.weight_B1)

        out_BH = borrow("out", len(batch.token_B), hidden_TH.shape[1])
        for expert, left, out in zip(batch.experts, batch.each(activation_Bi), batch.each(out_BH), strict=True):
            torch.bmm(left, _accurate(down_ESiH[expert]), out=out)
        out_TH.index_add_(0, batch.token_B, out_BH)
    return out_TH.to(out_dtype or hidden_states.dtype)


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Write left @ right, batches of matrices, to `out`, rounded once to its dtype."""
    if out.dtype == left.dtype:
        torch.bmm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _accurate_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _accurate(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or in float64 where it has that dtype already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
