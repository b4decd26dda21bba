"""The experts that a rank holds, of tokens that it has already: its part of each token's sum.

Shapes: T num_tokens, K top_k, N routed rows (T * K), R rows of this rank's experts among them, H hidden_size.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.distributed.expert_calls import ExpertCall, spread


class LocalRows(NamedTuple):
    """The routed rows of some of the experts."""

    order_R: torch.Tensor  # routed rows, sorted by expert; of one expert, in the order of the tokens
    group_sizes: torch.Tensor  # rows of each expert
    shape: torch.Size  # [num_tokens, top_k]

    def weighted_sum(self, out_RH: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Add up each token's weighted rows in the order of its choices; [T, H], zeros where it has none."""
        return _WeightedSum.apply(out_RH, topk_weights, self)

    def sums(
        self, call: ExpertCall, hidden_states: torch.Tensor, topk_weights: torch.Tensor, *, down_biases: bool = True
    ) -> torch.Tensor:
        """What these experts give to each token, [T, H] float32 at least; as are hidden_states and topk_weights."""
        rows_RH = _Take.apply(hidden_states, self)
        return self.weighted_sum(call.outputs(rows_RH, self.group_sizes, call.weights, down_biases=down_biases), topk_weights)

    def sums_of_biases(self, call: ExpertCall, topk_weights: torch.Tensor) -> torch.Tensor:
        """What of it comes of the biases that are added last."""
        return self.weighted_sum(spread(call.weights[call.down[1]], self.group_sizes, len(self.order_R)), topk_weights)


def rows_of_experts(topk_ids: torch.Tensor, first: int, count: int) -> LocalRows:
    """Find the rows of so many experts from a first one on; the host waits for how many they are."""
    ids_N, order_N = topk_ids.flatten().to(torch.int64).sort(stable=True)
    # searches, since a bincount waits for the GPU as well
    bounds = torch.searchsorted(ids_N, torch.arange(first, first + count + 1, device=ids_N.device))
    start, end = bounds[[0, -1]].tolist()
    return LocalRows(order_N[start:end], bounds.diff(), topk_ids.shape)


class _Take(torch.autograd.Function):
    """Tokens of rows; back, a token's rows are added up in the order of its choices."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, rows: LocalRows) -> torch.Tensor:
        ctx.rows = rows
        return hidden_states[rows.order_R // rows.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_RH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum_of_choices(d_rows_RH, ctx.rows), None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_RH: torch.Tensor, topk_weights: torch.Tensor, rows: LocalRows) -> torch.Tensor:
        weight_R1 = topk_weights.flatten()[rows.order_R, None]
        ctx.save_for_backward(out_RH, weight_R1)
        ctx.rows = rows
        return _sum_of_choices(weight_R1 * out_RH, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out_RH, weight_R1 = ctx.saved_tensors
        rows: LocalRows = ctx.rows
        d_out_RH = d_out_TH[rows.order_R // rows.shape[1]]
        d_rows_RH = d_topk_weights = None
        if ctx.needs_input_grad[0]:
            d_rows_RH = weight_R1 * d_out_RH
        if ctx.needs_input_grad[1]:
            d_weight_R = (out_RH * d_out_RH).sum(dim=-1)
            d_topk_weights = d_weight_R.new_zeros(rows.shape.numel()).index_copy_(0, rows.order_R, d_weight_R).view(rows.shape)
        return d_rows_RH, d_topk_weights, None


def _sum_of_choices(rows_RH: torch.Tensor, rows: LocalRows) -> torch.Tensor:
    """Put rows where they belong and add up those of each token; choices of other experts give nothing."""
    rows_NH = rows_RH.new_zeros(rows.shape.numel(), rows_RH.shape[1]).index_copy_(0, rows.order_R, rows_RH)
    return rows_NH.unflatten(0, rows.shape).sum(dim=1)
