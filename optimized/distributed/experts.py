"""Expert-parallel experts: tokens travel to the ranks that hold their experts, and the experts' outputs travel back.

Dispatch and combine undo each other's moves, and each is what the other's gradient needs. Rows travel to the experts in the
dtype of the inputs, since that is what is multiplied there: tokens, and backward the weighted gradients of the outputs. They
travel back in float32, outputs and gradients of tokens, since what is rounded is the sum over a token's choices. So a row of
bfloat16 costs 6 bytes a column on the way there and back, and 6 * intermediate_size operations: the link between the ranks is
what bounds it where intermediate_size is less than operations per second / bytes per second.

Before any row travels, one small all-to-all tells each rank how many rows it gets from whom, and whether all ranks made the
same good call. The host waits for the device twice: for the range of the ids, and for these counts, which are sizes of memory.
A rank without tokens takes part in every exchange, forward and backward.

An expert gets the same rows in the same order on any number of ranks, and sums run in the order of a token's choices: the same
bits in every run, and for 1, 2 or 4 ranks. On a GPU they depend on no other token; on the CPU, MKL picks its kernel by how many
tokens share an expert.

Shapes: T num_tokens of this rank, K top_k, N routed rows (T * K) of this rank, R rows that this rank's experts receive,
W ranks, H hidden_size, I intermediate_size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.reference import validation
from gaugeblock.reference.torch.experts import grouped_matmul
from gaugeblock.reference.torch.precision import at_least_float32

# Else ranks would wait for rows that nobody sends, or for a gradient that nobody computes.
AGREEMENTS = (
    "w13 must hold the same number of experts (num_experts / world_size)",
    "w13 must have the same number of gate and up rows",
    "hidden_states must have the same hidden_size",
    "hidden_states must have the same dtype",
    "hidden_states must require a gradient alike",
    "w13 must require a gradient alike",
    "w2 must require a gradient alike",
)


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts, which lie on all ranks, to each token of this rank; add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Every rank of the mesh calls it, and calls backward where one does, also with no tokens. Differentiable once, in all but
    topk_ids; gradients of w13 and w2 are summed over the tokens of all ranks. On a GPU, operands of matrix products are
    rounded to the dtype of hidden_states; all else is float32 (float64 for float64 inputs) and rounded once.

    Args:
        hidden_states: [num_tokens of this rank, hidden_size], floating; w13 and w2 have its dtype. Any number, also 0.
        w13: [num_experts / world_size, 2 * intermediate_size, hidden_size], gate rows, then up rows; rank r holds the experts
            from r * num_experts / world_size on.
        w2: [num_experts / world_size, hidden_size, intermediate_size].
        topk_weights: [num_tokens of this rank, top_k], floating, usually float32.
        topk_ids: [num_tokens of this rank, top_k], integer in 0..num_experts - 1, of all ranks' experts.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [num_tokens of this rank, hidden_size], dtype as hidden_states.

    Raises:
        TypeError: An argument of this rank is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert; or another rank's call raises, or does
            not fit to this one. Then all ranks raise, before any row travels.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`; the exchange is that of GShard (arXiv:2006.16668) section 3.2,
    without capacities.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}")
    routes = _route(hidden_states, w13, w2, topk_weights, topk_ids, mesh)
    multiply = _grouped_matmul_of(hidden_states)
    rows_RH = _Dispatch.apply(hidden_states, routes)
    gate_RI, up_RI = multiply(rows_RH, w13, routes.group_sizes).chunk(2, dim=-1)
    out_RH = multiply(torch.nn.functional.silu(gate_RI) * up_RI, w2, routes.group_sizes)
    return _Combine.apply(out_RH, topk_weights, hidden_states.dtype, routes)


class _Routes(NamedTuple):
    """Which row goes where: to_experts and from_experts undo each other."""

    order_N: torch.Tensor  # routed rows of this rank, sorted by expert, so by rank
    order_R: torch.Tensor  # received rows, sorted by expert; of one expert, in the order of ranks and tokens
    group_sizes: torch.Tensor  # rows of each expert of this rank
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    shape: torch.Size  # [num_tokens, top_k]
    group: dist.ProcessGroup

    @property
    def token_N(self) -> torch.Tensor:
        """The token of each row of order_N."""
        return self.order_N // self.shape[1]

    def to_experts(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """Send rows, in order_N, to their experts; return the rows received, sorted by expert, in the same dtype."""
        return _exchange(rows_NH, self.sent, self.received, self.group)[self.order_R]

    def from_experts(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """Send rows, sorted by expert, back to their tokens; return those of this rank, [num_tokens, top_k, ...]."""
        rows_RH = torch.empty_like(rows_RH).index_copy_(0, self.order_R, rows_RH)
        rows_NH = _exchange(rows_RH, self.received, self.sent, self.group)
        return torch.empty_like(rows_NH).index_copy_(0, self.order_N, rows_NH).unflatten(0, self.shape)


class _Dispatch(torch.autograd.Function):
    """Tokens to their experts, as float32 there, so that autograd does not round their gradients before they are summed."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, routes: _Routes) -> torch.Tensor:
        ctx.routes, ctx.dtype = routes, hidden_states.dtype
        return at_least_float32(routes.to_experts(hidden_states[routes.token_N]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_RH: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.routes.from_experts(d_rows_RH).sum(dim=1).to(ctx.dtype), None


class _Combine(torch.autograd.Function):
    """Outputs of the experts back to their tokens, weighted and added up."""

    @staticmethod
    def forward(ctx: Any, out_RH: torch.Tensor, topk_weights: torch.Tensor, dtype: torch.dtype, routes: _Routes) -> torch.Tensor:
        out_TKH = routes.from_experts(out_RH)
        ctx.save_for_backward(out_TKH, topk_weights)
        ctx.routes = routes
        return (topk_weights.to(out_TKH.dtype)[..., None] * out_TKH).sum(dim=1).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out_TKH, topk_weights = ctx.saved_tensors
        d_rows_RH = d_topk_weights = None
        if ctx.needs_input_grad[0]:
            order_N, token_N = ctx.routes.order_N, ctx.routes.token_N
            weight_N1 = topk_weights.flatten()[order_N, None].to(out_TKH.dtype)
            d_rows_NH = (weight_N1 * d_out_TH[token_N]).to(d_out_TH.dtype)
            d_rows_RH = ctx.routes.to_experts(d_rows_NH).to(out_TKH.dtype)
        if ctx.needs_input_grad[1]:
            d_topk_weights = (out_TKH * d_out_TH[:, None]).sum(dim=-1).to(topk_weights.dtype)
        return d_rows_RH, d_topk_weights, None, None


def _route(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    mesh: DeviceMesh,
) -> _Routes:
    """Check the call, here and on every rank; exchange how many rows go where, and which experts they are for."""
    ranks, error = mesh.size(), None
    ids_N = order_N = torch.empty(0, dtype=torch.int64, device=mesh.device_type)
    facts = dict.fromkeys(AGREEMENTS, 1)
    try:
        validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
        if hidden_states.device.type != mesh.device_type:
            raise ValueError(f"hidden_states must be on the device of mesh, {mesh.device_type}, got {hidden_states.device}")
        validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0] * ranks)
    except (TypeError, ValueError) as raised:
        error = raised  # raised again once the other ranks know
    else:
        ids_N, order_N = topk_ids.flatten().to(torch.int64).sort(stable=True)
        dtype = validation.FLOATING.index(validation.dtype_name(hidden_states))
        tracked = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, w13, w2)]
        facts = dict(zip(AGREEMENTS, (*w13.shape, dtype, *tracked), strict=True))

    experts_here = facts[AGREEMENTS[0]]
    # searches, since a bincount waits for the GPU
    sent_W = torch.searchsorted(ids_N, torch.arange(ranks + 1, device=ids_N.device) * experts_here).diff()
    sent, received = agree(sent_W, facts, error, mesh)
    group = mesh.get_group()
    ids_R, order_R = (_exchange(ids_N, sent, received, group) % experts_here).sort(stable=True)
    group_sizes = torch.searchsorted(ids_R, torch.arange(experts_here + 1, device=ids_R.device)).diff()
    return _Routes(order_N, order_R, group_sizes, sent, received, topk_ids.shape, group)


def _exchange(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Send rows, sorted by rank, `sent[r]` of them to rank r; return those of all ranks, `received[r]` from rank r."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def _grouped_matmul_of(hidden_states: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Choose what multiplies rows with their experts: Triton on a GPU; it has no float64."""
    if hidden_states.is_cuda and hidden_states.dtype != torch.float64:
        # imported here, since Triton is an optional package
        from gaugeblock.optimized.distributed import triton_grouped_matmul

        return triton_grouped_matmul.grouped_matmul
    return grouped_matmul
