"""Experts in PyTorch on the CPU, of any activation, with biases or without: rows sorted by expert, each expert's together.

Few rows for each expert are bound by reading weights, many by the products. What the speed comes from, measured on 2 cores with
MKL on an AMD EPYC:

- A product with weights is a batched one, with a part of the weights for each thread, since MKL divides a product of few rows
  badly: 8 rows for each of 64 experts of 512 x 512 take 8.5 ms, with one product for each expert 17.7. Both products are divided
  along intermediate_size, so that all between them stays in parts. The second one leaves a summand for each part.
- What is done element by element is done for a batch of experts at once. With 256 experts and 64 tokens, calls for each expert
  were half of the time.
- One batch after the other borrows the same memory, since fresh memory costs page faults. Gradients of weights are not asked
  for as huge pages: where a virtual machine gives free ones back to its host, 1 GB takes 1.3 s to write again, in small ones 0.3.
- The routing weight scales the activation (I wide), not the expert's output (H wide). The second bias is left out of both: what
  a token gets of it is a weighted sum of rows of [E, H].
- The gradients of the weights are written where they stay, in the order of memory that the weights have; autograd of `w13[e]`
  would add up E of full size.

A token's sum runs over the second biases, then over its experts in their order: the same bits in every run. They depend on
how many tokens share an expert, since MKL picks its kernel by the size of the product.

Shapes: those of `expert_rows.py`; H hidden_size, F rows of w13, f those of a part.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from gaugeblock.optimized.compiled.expert_activations import Activation
from gaugeblock.optimized.compiled.expert_rows import Routes, Scratch, gradient_of, routes_in_parts


class Weights(NamedTuple):
    """Those of all experts."""

    w13: torch.Tensor  # [num_experts, F, hidden_size]; w1 where there is no gate
    b13: torch.Tensor | None  # [num_experts, F]
    w2: torch.Tensor  # [num_experts, hidden_size, intermediate_size]
    b2: torch.Tensor | None  # [num_experts, hidden_size]


def sum_of_experts(
    activation: Activation,
    hidden_states: torch.Tensor,
    weights: Weights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Give each token to its experts, and add up what they return, weighted.

    Args:
        activation: Between the products.
        hidden_states: [num_tokens, hidden_size], floating; the weights have its dtype. Any strides.
        weights: Of the experts; biases are both there, or none.
        topk_weights: [num_tokens, top_k], floating.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1.
        out_dtype: Of the result; None for that of hidden_states.

    Returns:
        [num_tokens, hidden_size], of `out_dtype`; computed in float32 (float64 for float64 inputs)
        and rounded once, as is each gradient. Differentiable once, by every floating argument.
    """
    inputs = (hidden_states, *weights, topk_weights)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _SumOfExperts.apply(*inputs, topk_ids, activation, out_dtype)
    routes = _routes(topk_weights, topk_ids, weights.w2)
    return _forward(activation, hidden_states, weights, routes, topk_weights, topk_ids, out_dtype)


class _SumOfExperts(torch.autograd.Function):
    """Keeps what the first product leaves of every row; gathers and activates again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        b13: torch.Tensor | None,
        w2: torch.Tensor,
        b2: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Activation,
        out_dtype: torch.dtype | None,
    ) -> torch.Tensor:
        ctx.activation, ctx.routes = activation, _routes(topk_weights, topk_ids, w2)
        columns, dtype = w13.shape[1] // activation.products, _accurate_dtype(w2)
        kept = tuple(w13.new_empty(topk_ids.numel(), columns, dtype=dtype) for _ in range(activation.products))
        weights = Weights(w13, b13, w2, b2)
        out = _forward(activation, hidden_states, weights, ctx.routes, topk_weights, topk_ids, out_dtype, kept)
        ctx.save_for_backward(hidden_states, *weights, topk_weights, topk_ids, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, *kept = ctx.saved_tensors
        needs_hidden, needs_w13, needs_b13, needs_w2, needs_b2, needs_weights, *_ = ctx.needs_input_grad
        routes, activation = ctx.routes, ctx.activation
        hidden_TH, d_out_TH = _accurate(hidden_states), _accurate(d_out)
        parts = routes.place_NS.shape[1]
        matrices, down_ESHi = _rows_in_parts(w13, activation.products, parts), _w2_in_parts(w2, parts)
        d_w13 = gradient_of(w13, routes.experts) if needs_w13 else None
        d_b13 = hidden_TH.new_zeros(b13.shape) if needs_b13 else None
        d_w2 = gradient_of(w2, routes.experts) if needs_w2 else None
        d_hidden_TH = hidden_TH.new_zeros(hidden_TH.shape)
        d_topk_weights_B = hidden_TH.new_empty(routes.place_NS.numel())
        borrow = Scratch(hidden_TH)

        for batch in routes.batches:
            d_out_SnH = batch.for_all_parts(borrow.rows("d_out", d_out_TH, batch.token_R))
            d_activation_Bi = borrow("d_activation", len(batch.token_B), w2.shape[2] // parts)
            for expert, left, out in zip(batch.experts, d_out_SnH, batch.each(d_activation_Bi), strict=True):
                torch.bmm(left, _accurate(down_ESHi[expert]), out=out)

            activation_Bi, pull_back = activation.vjp([batch.of_all(each) for each in kept], borrow)
            if needs_weights:
                torch.sum(d_activation_Bi * activation_Bi, 1, out=d_topk_weights_B[batch.in_parts])
            if d_w2 is not None:
                d_down_ESHi = _w2_in_parts(d_w2, parts)
                activation_Sni = batch.each(activation_Bi.mul_(batch.weight_B1))
                for expert, left, right in zip(batch.experts, d_out_SnH, activation_Sni, strict=True):
                    _multiply(left.mT, right, out=d_down_ESHi[expert])

            d_rows = [batch.each(each) for each in pull_back(d_activation_Bi.mul_(batch.weight_B1))]
            if d_w13 is not None:
                hidden_SnH = batch.for_all_parts(borrow.rows("hidden", hidden_TH, batch.token_R))
                for d_matrix_ESfH, d_rows_Snf in zip(_rows_in_parts(d_w13, activation.products, parts), d_rows, strict=True):
                    for expert, left, right in zip(batch.experts, d_rows_Snf, hidden_SnH, strict=True):
                        _multiply(left.mT, right, out=d_matrix_ESfH[expert])
            if d_b13 is not None:
                for d_bias_ESf, d_rows_Snf in zip(_rows_in_parts(d_b13, activation.products, parts), d_rows, strict=True):
                    for expert, rows in zip(batch.experts, d_rows_Snf, strict=True):
                        torch.sum(rows, 1, out=d_bias_ESf[expert])
            if needs_hidden:
                d_hidden_BH = borrow("d_hidden", len(batch.token_B), hidden_TH.shape[1])
                for expert, out, *lefts in zip(batch.experts, batch.each(d_hidden_BH), *d_rows, strict=True):
                    torch.bmm(lefts[0], _accurate(matrices[0][expert]), out=out)
                    for left, matrix_ESfH in zip(lefts[1:], matrices[1:], strict=True):
                        out.baddbmm_(left, _accurate(matrix_ESfH[expert]))
                d_hidden_TH.index_add_(0, batch.token_B, d_hidden_BH)

        d_hidden = d_hidden_TH.to(hidden_states.dtype) if needs_hidden else None
        d_b13 = d_b13.to(b13.dtype) if d_b13 is not None else None
        d_b2 = routes.sums_of_rows(d_out_TH).to(b2.dtype) if needs_b2 else None
        d_topk_weights = routes.sum_of_parts(d_topk_weights_B).view(topk_weights.shape) if needs_weights else None
        if d_topk_weights is not None and b2 is not None:
            d_topk_weights += (d_out_TH @ _accurate(b2).mT).gather(1, topk_ids.long())
        return d_hidden, d_w13, d_b13, d_w2, d_b2, d_topk_weights, None, None, None


def _rows_in_parts(w13: torch.Tensor, products: int, parts: int) -> tuple[torch.Tensor, ...]:
    """Return w13, its bias, or a gradient of them, as [E, S, f, ...] for each product."""
    return w13.unflatten(1, (products, parts, w13.shape[1] // products // parts)).unbind(1)


def _w2_in_parts(w2: torch.Tensor, parts: int) -> torch.Tensor:
    """Return w2, or its gradient, as [E, S, H, i]."""
    return w2.unflatten(2, (parts, w2.shape[2] // parts)).transpose(1, 2)


def _routes(topk_weights: torch.Tensor, topk_ids: torch.Tensor, w2: torch.Tensor) -> Routes:
    # a part for each thread, or as many as divide the width; two for one thread, so that the gate, which has one, sees parts
    parts = math.gcd(w2.shape[2], max(2, torch.get_num_threads()))
    topk_weights = topk_weights.to(_accurate_dtype(w2))
    return routes_in_parts(topk_weights, topk_ids, num_experts=len(w2), width=w2.shape[2], parts=parts)


def _forward(
    activation: Activation,
    hidden_states: torch.Tensor,
    weights: Weights,
    routes: Routes,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out_dtype: torch.dtype | None,
    keep: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """Return the output [T, H]; what each of the first products leaves, [N, S * f], is written to `keep`."""
    hidden_TH = _accurate(hidden_states)
    w13, b13, w2, b2 = weights
    if b2 is None:
        out_TH = hidden_TH.new_zeros(hidden_TH.shape)
    else:
        out_TH = embedding_bag(topk_ids, _accurate(b2), per_sample_weights=topk_weights.to(hidden_TH.dtype), mode="sum")

    products, parts = activation.products, routes.place_NS.shape[1]
    matrices_ESHf = [each.mT for each in _rows_in_parts(w13, products, parts)]
    biases_ES1f = None if b13 is None else [each[:, :, None] for each in _rows_in_parts(_accurate(b13), products, parts)]
    down_ESiH = _w2_in_parts(w2, parts).mT
    borrow = Scratch(hidden_TH)
    for batch in routes.batches:
        shape = len(batch.token_B), w13.shape[1] // products // parts
        rows = [batch.of_all(each) for each in keep] or [borrow(f"rows {product}", *shape) for product in range(products)]
        hidden_SnH = batch.for_all_parts(borrow.rows("hidden", hidden_TH, batch.token_R))
        for expert, left, *outs in zip(batch.experts, hidden_SnH, *map(batch.each, rows), strict=True):
            for product, out in enumerate(outs):
                right = _accurate(matrices_ESHf[product][expert])
                if biases_ES1f is None:
                    torch.bmm(left, right, out=out)
                else:
                    torch.baddbmm(biases_ES1f[product][expert], left, right, out=out)

        activation_Bi = activation.activate(rows, borrow).mul_(batch.weight_B1)
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
