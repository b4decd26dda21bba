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
are chosen by the rows of an expert too, where there are too few programs for a GPU, sums over the depth are split, and
where there are many, each computes several tiles (`persistent.py`); all of it is deterministic.

Matrices are read once per block of rows, from cache where an expert has several; tokens once per block of columns. Many rows per
expert are bound by the matrix units, few by reading the matrices.
"""

from typing import NamedTuple

import torch

from gaugeblock.optimized.triton.activations import Activation
from gaugeblock.optimized.triton.dispatch import Blocks, block_offsets, group_by, split_into_blocks, sum_listed, sum_rows
from gaugeblock.optimized.triton.expert_products import Expert, first_product, through_activation
from gaugeblock.optimized.triton.grouped_matmul import Tiles, choose_splits, choose_tiles, rows_times_matrices, sum_of_products
from gaugeblock.optimized.triton.launch import multiprocessors_of


class Plan(NamedTuple):
    """How experts are computed."""

    activation: Activation
    batch_invariant: bool
    keep: bool
    """Whether the pre-activations are kept for the backward pass."""
    out_dtype: torch.dtype | None = None
    """Of the result, to which sums are rounded; None for that of the tokens."""

    def by_batch(self, rows: torch.Tensor, expert: Expert) -> dict[str, int]:
        """What tiles are chosen by beside widths: keyword arguments of `choose_tiles`."""
        if self.batch_invariant:
            return {}
        return {"rows_per_expert": -(-rows.shape[0] // expert.w1.shape[0]), "multiprocessors": multiprocessors_of(rows)}

    def splits(self, blocks: Blocks, matrices: torch.Tensor, tiles: Tiles) -> int:
        """Into how many parts the sums of a product with matrices [num_experts, width, depth] are split."""
        width, depth = matrices.shape[1:]
        return 1 if self.batch_invariant else choose_splits(blocks.experts.shape[0], width, depth, tiles)


class Saved(NamedTuple):
    """What the backward pass needs.

    Attributes:
        hidden_states: [num_tokens, hidden_size].
        w1, b1, w2, b2: Those of `Expert`.
        topk_weights: [num_tokens, top_k].
        kept: [num_rows, products * intermediate_size] float32, the pre-activations, of gate, then of up; None if they are to be
            computed again.
        rows: [num_rows] int64, the routed row at each position.
        expert_offsets: [num_experts + 1] int64, the positions of each expert.
    """

    hidden_states: torch.Tensor
    w1: torch.Tensor
    b1: torch.Tensor | None
    w2: torch.Tensor
    b2: torch.Tensor | None
    topk_weights: torch.Tensor
    kept: torch.Tensor | None
    rows: torch.Tensor
    expert_offsets: torch.Tensor


def forward_pass(
    plan: Plan, hidden_states: torch.Tensor, expert: Expert, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[torch.Tensor, Saved]:
    """Return the experts' outputs, added up for each token, and what `backward_pass` needs."""
    rows, expert_offsets = group_by(topk_ids, expert.w1.shape[0])
    by_batch = plan.by_batch(rows, expert)
    tiles = choose_tiles(hidden_states, expert.w1, expert.w2, **by_batch)
    first_tiles = choose_tiles(hidden_states, expert.w1, expert.w2, accumulators=plan.activation.products, **by_batch)
    blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)

    of_rows = (rows, blocks, topk_ids.shape[1])
    activation, kept = first_product(hidden_states, expert, plan.activation, *of_rows, first_tiles, keep=plan.keep)
    splits = plan.splits(blocks, expert.w2, tiles)
    out = rows_times_matrices(activation, expert.w2, rows, blocks, tiles, biases=expert.b2, splits=splits)
    out = sum_rows(out.view(*topk_ids.shape, *out.shape[1:]), topk_weights, plan.out_dtype or hidden_states.dtype)
    return out, Saved(hidden_states, *expert, topk_weights, kept, rows, expert_offsets)


def backward_pass(
    plan: Plan, needed: tuple[bool, ...], out_gradient: torch.Tensor, saved: Saved
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of hidden_states, w1, b1, w2, b2 and topk_weights where they are needed.

    That of hidden_states comes as rows, [num_tokens, top_k, splits, hidden_size] float32, which are to be added up.
    """
    needs_hidden, needs_w1, needs_b1, needs_w2, needs_b2, needs_weights = needed
    hidden_states, w1, b1, w2, b2, topk_weights, kept, rows, expert_offsets = saved
    expert, top_k = Expert(w1, b1, w2, b2), topk_weights.shape[1]
    hidden_rows = w1_gradient = b1_gradient = w2_gradient = b2_gradient = weights_gradient = None

    operands = (hidden_states, out_gradient, w1, w2)
    by_batch, products = plan.by_batch(rows, expert), plan.activation.products
    tiles = choose_tiles(*operands, **by_batch)
    first_tiles = choose_tiles(*operands, accumulators=1 + products, **by_batch)
    blocks = split_into_blocks(expert_offsets, rows.shape[0], tiles.rows)
    slopes = through_activation(
        hidden_states, out_gradient, expert, plan.activation, topk_weights, kept, rows, blocks, first_tiles
    )  # fmt: skip
    if needs_hidden:
        splits = plan.splits(blocks, w1.mT, tiles)
        hidden_rows = rows_times_matrices(slopes.pre_activations, w1.mT, rows, blocks, tiles, splits=splits)
        hidden_rows = hidden_rows.view(*topk_weights.shape, *hidden_rows.shape[1:])
    if needs_weights:
        # blocks of columns are to a routed row what its choices are to a token
        summands = slopes.weight_summands[None, :, None]
        weights_gradient = sum_rows(summands, None, topk_weights.dtype).view_as(topk_weights)

    of_rows = (rows, expert_offsets, top_k, choose_tiles(*operands)._replace(multiprocessors=tiles.multiprocessors))
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
