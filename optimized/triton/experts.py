"""Experts in three kernels forward and at most seven backward, over routed rows sorted by expert.

Forward: `first_product` gathers tokens, multiplies them by the first matrix and writes the activation in the dtype of the inputs;
`rows_times_matrices` multiplies that by the second into float32 rows; `sum_rows` adds up the rows of each token, weighted, in the
order of its choices, and rounds once. Nothing is added by atomics, so that every run gives the same bits.

Backward: `through_activation` computes what all gradients are made of, from the pre-activations, which the forward
pass keeps (of each routed row, beside the inputs and their order), or, with `recompute`, from one more product, which
is 2/9 of a training step's. Of topk_weights the gradient is <activation, out_gradient @ w2>, which is <expert output,
out_gradient> without the output; of the matrices, sums over each expert's rows; of the tokens, rows, summed as in the
forward pass.

By default no token's bits depend on its batch: tiles are chosen by widths alone. With `batch_invariant=False` they
are chosen by the rows of an expert too, and where there are too few programs for a GPU, sums over the depth are
split; both are deterministic.

Matrices are read once per block of rows, from cache where an expert has several; tokens once per block of columns. Many rows per
expert are bound by the matrix units, few by reading the matrices.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.activations import Activation, Nonlinearity
from gaugeblock.optimized.triton.dispatch import (
    block_offsets,
    reject_float64,
    sort_by_expert,
    split_into_blocks,
    sum_listed,
    sum_rows,
)
from gaugeblock.optimized.triton.expert_products import Expert, first_product, through_activation
from gaugeblock.optimized.triton.grouped_matmul import Tiles, choose_splits, choose_tiles, rows_times_matrices, sum_of_products
from gaugeblock.optimized.triton.launch import device_of, require_triton_device
from gaugeblock.reference import validation

SWIGLU = Activation("silu")
GELU: dict[str, Nonlinearity] = {"none": "gelu", "tanh": "gelu_tanh"}


class _Plan(NamedTuple):
    """How experts are computed."""

    activation: Activation
    batch_invariant: bool
    keep: bool
    """Whether the pre-activations are kept for the backward pass."""

    def rows_per_expert(self, rows: torch.Tensor, expert: Expert) -> int | None:
        """What tiles are chosen by beside widths."""
        return None if self.batch_invariant else -(-rows.shape[0] // expert.w1.shape[0])

    def splits(self, num_blocks: int, width: int, depth: int, tiles: Tiles) -> int:
        """Into how many parts the sums of a product are split."""
        return 1 if self.batch_invariant else choose_splits(num_blocks, width, depth, tiles)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        b1: torch.Tensor | None,
        w2: torch.Tensor,
        b2: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        expert = Expert(w1, b1, w2, b2)
        rows, expert_offsets = sort_by_expert(topk_ids, num_experts=w1.shape[0])
        few = plan.rows_per_expert(rows, expert)
        tiles = choose_tiles(hidden_states, w1, w2, rows_per_expert=few)
        first_tiles = choose_tiles(hidden_states, w1, w2, accumulators=plan.activation.products, rows_per_expert=few)
        blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)

        of_rows = (rows, blocks, topk_ids.shape[1])
        activation, kept = first_product(hidden_states, expert, plan.activation, *of_rows, first_tiles, keep=plan.keep)
        splits = plan.splits(blocks.experts.shape[0], *w2.shape[1:], tiles)
        out = rows_times_matrices(activation, w2, rows, blocks, tiles, biases=b2, splits=splits)
        ctx.plan = plan
        ctx.save_for_backward(hidden_states, w1, b1, w2, b2, topk_weights, kept, rows, expert_offsets)
        return sum_rows(out.view(*topk_ids.shape, *out.shape[1:]), topk_weights, hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with device_of(out_gradient):
            hidden, *others = _gradients(ctx.plan, ctx.needs_input_grad[1:7], out_gradient, *ctx.saved_tensors)
            hidden = None if hidden is None else sum_rows(hidden, None, out_gradient.dtype)
            return None, hidden, *others, None


def _gradients(
    plan: _Plan,
    needed: tuple[bool, ...],
    out_gradient: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    topk_weights: torch.Tensor,
    kept: torch.Tensor | None,
    rows: torch.Tensor,
    expert_offsets: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of hidden_states, w1, b1, w2, b2 and topk_weights where they are needed.

    That of hidden_states comes as rows, [num_tokens, top_k, splits, hidden_size] float32, which are to be added up.
    """
    needs_hidden, needs_w1, needs_b1, needs_w2, needs_b2, needs_weights = needed
    expert, top_k = Expert(w1, b1, w2, b2), topk_weights.shape[1]
    hidden_rows = w1_gradient = b1_gradient = w2_gradient = b2_gradient = weights_gradient = None

    operands = (hidden_states, out_gradient, w1, w2)
    few, products = plan.rows_per_expert(rows, expert), plan.activation.products
    tiles = choose_tiles(*operands, rows_per_expert=few)
    first_tiles = choose_tiles(*operands, accumulators=1 + products, rows_per_expert=few)
    blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)
    slopes = through_activation(
        hidden_states, out_gradient, expert, plan.activation, topk_weights, kept, rows, blocks, first_tiles
    )  # fmt: skip
    if needs_hidden:
        splits = plan.splits(blocks.experts.shape[0], *w1.mT.shape[1:], tiles)
        hidden_rows = rows_times_matrices(slopes.pre_activations, w1.mT, rows, blocks, tiles, splits=splits)
        hidden_rows = hidden_rows.view(*topk_weights.shape, *hidden_rows.shape[1:])
    if needs_weights:
        # blocks of columns are to a routed row what its choices are to a token
        summands = slopes.weight_summands[None, :, None]
        weights_gradient = sum_rows(summands, None, topk_weights.dtype).view_as(topk_weights)

    of_rows = (rows, expert_offsets, top_k, choose_tiles(*operands))
    if needs_w1:
        w1_gradient = w1.new_empty(w1.shape)
        sum_of_products(slopes.pre_activations, hidden_states, w1_gradient, *of_rows)
    if needs_w2:
        w2_gradient = w2.new_empty(w2.shape)
        sum_of_products(slopes.activation, out_gradient, w2_gradient.mT, *of_rows)
    if needs_b1 and b1 is not None and slopes.bias_summands is not None:
        starts = block_offsets(expert_offsets, tiles.rows)
        b1_gradient = sum_listed(slopes.bias_summands, starts, top_k=1).to(b1.dtype)
    if needs_b2:
        b2_gradient = sum_listed(out_gradient, expert_offsets, top_k=top_k, entries=rows, weights=topk_weights)
    return hidden_rows, w1_gradient, b1_gradient, w2_gradient, b2_gradient, weights_gradient


def _apply(
    activation: Activation,
    hidden_states: torch.Tensor,
    expert: Expert,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    batch_invariant: bool,
    recompute: bool,
) -> torch.Tensor:
    """Look at what validation leaves to kernels, and launch them."""
    for name, tensor in (("hidden_states", hidden_states), ("topk_weights", topk_weights)):
        reject_float64(name, tensor)
    validation.expert_ids_in_range(topk_ids, num_experts=expert.w1.shape[0])
    require_triton_device("hidden_states", hidden_states)
    floating = (hidden_states, *expert, topk_weights)
    differentiated = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in floating)
    with device_of(hidden_states):
        plan = _Plan(activation, batch_invariant, keep=differentiated and not recompute)
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

    Returns:
        [num_tokens, hidden_size], dtype of hidden_states.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or Triton cannot run
            on the device.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`.
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    activation, expert = SWIGLU, Expert(w13, None, w2, None)
    return _apply(activation, hidden_states, expert, topk_weights, topk_ids, batch_invariant=batch_invariant, recompute=recompute)


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
