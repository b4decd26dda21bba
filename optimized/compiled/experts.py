"""Fused SwiGLU experts in PyTorch on the CPU: rows sorted by expert, each expert's rows together.

Bound by the matrix products; everything else is done expert by expert, while it lies in the cache. What the
speed comes from, measured on 2 cores with MKL:

- A product with weights is a batched one, with a part of the weights for each thread: 190 GFLOP/s, where one
  product of 256 rows reaches 140 to 180.
- The experts borrow their memory in turn, since fresh memory costs page faults: gathering 33 MB takes 1 ms
  instead of 13.
- The routing weight scales the activation (I wide), not the expert's output (H wide).
- The gradients of the weights are written where they stay; autograd of `w13[e]` would add up E of full size.

A token's sum over its experts runs in the order of the experts: the same bits in every run. They depend on
how many tokens share an expert, since MKL picks its kernel by the size of the product.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size, I intermediate_size,
F gate and up together (2 * I), R routed rows of one expert, P the same padded to an even number; S parts of
a width, one for each thread, and a part in a small letter: [S, P, i] is [P, I] in S blocks of columns.
"""

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from gaugeblock.reference import validation

ROWS_MULTIPLE = 2  # the gradients of weights are sums over rows, and 12 % slower over an odd number of them


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
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

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
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
        return _FusedSwiGLU.apply(*inputs, topk_ids)
    return _forward(hidden_states, w13, w2, _group_by_expert(topk_weights, topk_ids, w13))


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
    ) -> torch.Tensor:
        ctx.groups = _group_by_expert(topk_weights, topk_ids, w13)
        gate_ups: list[torch.Tensor] = []
        out = _forward(hidden_states, w13, w2, ctx.groups, keep=gate_ups)
        ctx.save_for_backward(hidden_states, w13, w2, topk_weights, *gate_ups)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_states, w13, w2, topk_weights, *gate_ups = ctx.saved_tensors
        needs_hidden, needs_w13, needs_w2, needs_weights, _ = ctx.needs_input_grad
        hidden_TH, d_out_TH = _accurate(hidden_states), _accurate(d_out)
        d_hidden_TH = hidden_TH.new_zeros(hidden_TH.shape)
        d_weight_N = hidden_TH.new_empty(topk_weights.numel())
        d_w13, d_w2 = _gradient(w13, needs_w13, ctx.groups), _gradient(w2, needs_w2, ctx.groups)
        borrow = _Scratch(hidden_TH)

        for (expert, row_R, token_P, weight_P1), gate_up_SPi in zip(ctx.groups, gate_ups, strict=True):
            gate_SPi, up_SPi = gate_up_SPi.chunk(2)
            parts, padded, part = gate_SPi.shape
            sigmoid_SPi = torch.sigmoid(gate_SPi, out=borrow("sigmoid", parts, padded, part))
            silu_SPi = torch.mul(gate_SPi, sigmoid_SPi, out=borrow("silu", parts, padded, part))
            activation_PI = borrow("activation", padded, parts * part)
            activation_SPi = torch.mul(silu_SPi, up_SPi, out=_in_parts(activation_PI, parts))

            rows_PH = borrow("rows", padded, hidden_TH.shape[1])
            d_out_PH = torch.index_select(d_out_TH, 0, token_P, out=rows_PH)
            d_activation_SPi = borrow("d_activation", parts, padded, part)
            _project(d_out_PH, _accurate(w2[expert]).mT, out=d_activation_SPi)
            if needs_weights:
                d_weight_N[row_R] = (d_activation_SPi * activation_SPi).sum((0, 2))[: len(row_R)]
            d_activation_SPi.mul_(weight_P1)
            if d_w2 is not None:
                _multiply(d_out_PH.mT, activation_PI.mul_(weight_P1), out=d_w2[expert])

            d_gate_up_PF = borrow("d_gate_up", padded, 2 * parts * part)
            d_gate_SPi, d_up_SPi = _in_parts(d_gate_up_PF, 2 * parts).chunk(2)
            torch.mul(d_activation_SPi, silu_SPi, out=d_up_SPi)
            d_silu_SPi = sigmoid_SPi.addcmul_(silu_SPi, 1 - sigmoid_SPi)
            torch.mul(d_activation_SPi.mul_(up_SPi), d_silu_SPi, out=d_gate_SPi)
            if d_w13 is not None:
                hidden_PH = torch.index_select(hidden_TH, 0, token_P, out=rows_PH)
                _multiply(d_gate_up_PF.mT, hidden_PH, out=d_w13[expert])
            if needs_hidden:
                d_hidden_SPh = borrow("d_hidden", *_shape_in_parts(padded, hidden_TH.shape[1]))
                _project(d_gate_up_PF, _accurate(w13[expert]).mT, out=d_hidden_SPh)
                _add_rows(d_hidden_TH, token_P[: len(row_R)], d_hidden_SPh)

        d_hidden = d_hidden_TH.to(hidden_states.dtype) if needs_hidden else None
        d_weights = d_weight_N.view(topk_weights.shape).to(topk_weights.dtype) if needs_weights else None
        return d_hidden, d_w13, d_w2, d_weights, None


class _Group(NamedTuple):
    """The routed rows of one expert; the padding repeats the first of them, at weight 0."""

    expert: int
    row_R: torch.Tensor  # positions in topk_ids.flatten(), ascending
    token_P: torch.Tensor
    weight_P1: torch.Tensor


def _forward(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    groups: list[_Group],
    keep: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the output [T, H]; append gate and up of each group, [2 * S, P, i], to `keep`."""
    hidden_TH = _accurate(hidden_states)
    out_TH = hidden_TH.new_zeros(hidden_TH.shape)
    hidden_size, intermediate_size = w2.shape[1:]
    borrow = _Scratch(hidden_TH)
    for expert, row_R, token_P, weight_P1 in groups:
        padded = len(token_P)
        hidden_PH = torch.index_select(hidden_TH, 0, token_P, out=borrow("hidden", padded, hidden_size))
        parts, _, part = _shape_in_parts(padded, intermediate_size)
        if keep is None:
            gate_up_SPi = borrow("gate_up", 2 * parts, padded, part)
        else:
            gate_up_SPi = hidden_TH.new_empty(2 * parts, padded, part)
            keep.append(gate_up_SPi)
        _project(hidden_PH, _accurate(w13[expert]), out=gate_up_SPi)
        gate_SPi, up_SPi = gate_up_SPi.chunk(2)
        activation_PI = borrow("activation", padded, intermediate_size)
        torch.sigmoid(gate_SPi, out=_in_parts(activation_PI, parts)).mul_(gate_SPi).mul_(up_SPi)
        out_SPh = borrow("out", *_shape_in_parts(padded, hidden_size))
        _project(activation_PI.mul_(weight_P1), _accurate(w2[expert]), out=out_SPh)
        _add_rows(out_TH, token_P[: len(row_R)], out_SPh)
    return out_TH.to(hidden_states.dtype)


def _group_by_expert(topk_weights: torch.Tensor, topk_ids: torch.Tensor, w13: torch.Tensor) -> list[_Group]:
    """Return a group for every expert that has rows."""
    expert_N = topk_ids.flatten()
    compute_dtype = torch.promote_types(w13.dtype, torch.float32)
    sizes = expert_N.bincount(minlength=w13.shape[0]).tolist()
    groups = []
    for expert, row_R in enumerate(expert_N.argsort(stable=True).split(sizes)):
        rows = len(row_R)
        if rows:
            row_P = torch.cat([row_R, row_R[:1].expand(-rows % ROWS_MULTIPLE)])
            weight_P1 = topk_weights.take(row_P).to(compute_dtype)[:, None]
            weight_P1[rows:] = 0
            groups.append(_Group(expert, row_R, row_P // topk_ids.shape[1], weight_P1))
    return groups


def _project(rows_PD: torch.Tensor, weight_OD: torch.Tensor, out: torch.Tensor) -> None:
    """Write rows @ weight.T to `out` [S, P, o]: O in S parts, each of which a thread multiplies alone."""
    parts, _, part = out.shape
    torch.bmm(rows_PD.expand(parts, -1, -1), weight_OD.unflatten(0, (parts, part)).mT, out=out)


def _multiply(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Write left @ right to `out`, rounded once to its dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_rows(sums_TH: torch.Tensor, token_R: torch.Tensor, rows_SPh: torch.Tensor) -> None:
    """Add each row to its token's sum, one after the other; the padding is left out."""
    _in_parts(sums_TH, len(rows_SPh)).index_add_(1, token_R, rows_SPh[:, : len(token_R)])


def _shape_in_parts(rows: int, width: int) -> tuple[int, int, int]:
    """Return [S, rows, width / S], with a part for each thread, or as many as divide the width."""
    parts = math.gcd(width, torch.get_num_threads())
    return parts, rows, width // parts


def _in_parts(x_PI: torch.Tensor, parts: int) -> torch.Tensor:
    """Return a view [S, P, i] of [P, I]."""
    return x_PI.unflatten(1, (parts, x_PI.shape[1] // parts)).transpose(0, 1)


def _gradient(weights: torch.Tensor, needed: bool, groups: list[_Group]) -> torch.Tensor | None:
    """Return memory for the gradient of weights [E, ...], 0 for experts without rows; None if not needed."""
    if not needed:
        return None
    gradient = torch.empty_like(weights, memory_format=torch.contiguous_format)
    for expert in set(range(len(weights))) - {group.expert for group in groups}:
        gradient[expert].zero_()
    return gradient


def _accurate(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or in float64 where it has that dtype already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Scratch:
    """Memory that one expert after the other borrows, by name; it grows to what the largest group needs."""

    def __init__(self, like: torch.Tensor) -> None:
        self.like = like
        self.memory: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        if name not in self.memory or len(self.memory[name]) < size:
            self.memory[name] = self.like.new_empty(size)
        return self.memory[name][:size].view(shape)
