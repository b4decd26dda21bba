"""Expert-parallel experts: tokens travel to the ranks that hold their experts, and the experts' outputs travel back.

Dispatch and combine undo each other's moves, and each is what the other's gradient needs. Rows travel to the experts in the
dtype of the inputs, since that is what is multiplied there: tokens, and backward the gradients of the outputs, with their
float32 weights beside them: a bias adds them up, and is no product whose operands are rounded. They travel back in float32,
outputs and gradients of tokens, since what is rounded is the sum over a token's choices. So a row of
bfloat16 costs 6 bytes a column on the way there and back, and 6 * intermediate_size operations: the link between the ranks is
what bounds it where intermediate_size is less than operations per second / bytes per second.

Before any row travels, one small all-to-all tells each rank how many rows it gets from whom, and whether all ranks made the
same good call. The host waits for the device twice: for the range of the ids, and for these counts, which are sizes of memory.
A rank without tokens takes part in every exchange, forward and backward.

An expert gets the same rows in the same order on any number of ranks, and sums run in the order of a token's choices: the same
bits in every run, and for 1, 2 or 4 ranks. On a GPU they depend on no other token; on the CPU, MKL picks its kernel by how many
tokens share an expert.

Shapes: T num_tokens of this rank, K top_k, N routed rows (T * K) of this rank, R rows that this rank's experts receive,
W ranks, H hidden_size, I intermediate_size, F gate and up together (2 * I).
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import expert_calls
from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.collectives import exchange
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.torch.precision import at_least_float32


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
    return sum_of_experts(expert_calls.swiglu(hidden_states, w13, w2, topk_weights, topk_ids), mesh)


def fused_geglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: GeluApproximation,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """As `fused_swiglu` here, but of what `gaugeblock.reference.torch.experts.fused_geglu` computes."""
    call = expert_calls.geglu(hidden_states, w13, w2, topk_weights, topk_ids, approximate)
    return sum_of_experts(call, mesh)


def fused_gelu_mlp(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: GeluApproximation,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """As `fused_swiglu` here, but of what `gaugeblock.reference.torch.experts.fused_gelu_mlp` computes."""
    call = expert_calls.gelu_mlp(hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, approximate)
    return sum_of_experts(call, mesh)


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
    mesh: DeviceMesh,
) -> torch.Tensor:
    """As `fused_swiglu` here, but of what `gaugeblock.reference.torch.experts.fused_swiglu_oai` computes."""
    call = expert_calls.swiglu_oai(hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, alpha, limit)
    return sum_of_experts(call, mesh)


def sum_of_experts(call: expert_calls.ExpertCall, mesh: DeviceMesh) -> torch.Tensor:
    """Send tokens to their experts, and add up what these make of them."""
    expert_calls.require_one_dimension(mesh)
    routes = _route(call, mesh)
    rows_RH = _Dispatch.apply(call.hidden_states, routes)
    out_RH = call.outputs(rows_RH, routes.group_sizes)
    return _Combine.apply(out_RH, call.topk_weights, call.hidden_states.dtype, routes)


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
        return exchange(rows_NH, self.sent, self.received, self.group)[self.order_R]

    def from_experts(self, rows_RH: torch.Tensor) -> torch.Tensor:
        """Send rows, sorted by expert, back to their tokens; return those of this rank, [num_tokens, top_k, ...]."""
        rows_RH = torch.empty_like(rows_RH).index_copy_(0, self.order_R, rows_RH)
        rows_NH = exchange(rows_RH, self.received, self.sent, self.group)
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
            weight_R1 = ctx.routes.to_experts(topk_weights.flatten()[order_N, None]).to(out_TKH.dtype)
            d_rows_RH = weight_R1 * ctx.routes.to_experts(d_out_TH[token_N]).to(out_TKH.dtype)
        if ctx.needs_input_grad[1]:
            d_topk_weights = (out_TKH * d_out_TH[:, None]).sum(dim=-1).to(topk_weights.dtype)
        return d_rows_RH, d_topk_weights, None, None


def _route(call: expert_calls.ExpertCall, mesh: DeviceMesh) -> _Routes:
    """Check the call, here and on every rank; exchange how many rows go where, and which experts they are for."""
    ranks, error = mesh.size(), call.error(mesh, num_holders=mesh.size())
    ids_N = order_N = torch.empty(0, dtype=torch.int64, device=mesh.device_type)
    experts_here = 1
    if error is None:
        ids_N, order_N = call.topk_ids.flatten().to(torch.int64).sort(stable=True)
        experts_here = len(call.up.weights)

    # searches, since a bincount waits for the GPU
    sent_W = torch.searchsorted(ids_N, torch.arange(ranks + 1, device=ids_N.device) * experts_here).diff()
    sent, received = agree(sent_W, call.facts(error), error, mesh)
    group = mesh.get_group()
    ids_R, order_R = (exchange(ids_N, sent, received, group) % experts_here).sort(stable=True)
    group_sizes = torch.searchsorted(ids_R, torch.arange(experts_here + 1, device=ids_R.device)).diff()
    return _Routes(order_N, order_R, group_sizes, sent, received, call.topk_ids.shape, group)
