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

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import silu

from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.torch import experts as reference
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

    def swiglu_experts(rows_RH: torch.Tensor, multiply: _Products) -> torch.Tensor:
        gate_RI, up_RI = multiply(rows_RH, w13).chunk(2, dim=-1)
        return multiply(silu(gate_RI) * up_RI, w2)

    check = partial(validation.fused_swiglu, hidden_states, w13, w2, topk_weights, topk_ids)
    weights = {"w13": w13, "w2": w2}
    return _sum_of_experts(swiglu_experts, check, hidden_states, weights, topk_weights, topk_ids, mesh)


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

    def geglu_experts(rows_RH: torch.Tensor, multiply: _Products) -> torch.Tensor:
        gate_RI, up_RI = multiply(rows_RH, w13).chunk(2, dim=-1)
        return multiply(reference.gelu(gate_RI, approximate) * up_RI, w2)

    check = partial(validation.fused_geglu, hidden_states, w13, w2, topk_weights, topk_ids, approximate)
    weights = {"w13": w13, "w2": w2}
    return _sum_of_experts(geglu_experts, check, hidden_states, weights, topk_weights, topk_ids, mesh)


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

    def gelu_experts(rows_RH: torch.Tensor, multiply: _Products) -> torch.Tensor:
        return multiply(reference.gelu(multiply(rows_RH, w1, b1), approximate), w2, b2)

    check = partial(validation.fused_gelu_mlp, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, approximate)
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    return _sum_of_experts(gelu_experts, check, hidden_states, weights, topk_weights, topk_ids, mesh)


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

    def swiglu_oai_experts(rows_RH: torch.Tensor, multiply: _Products) -> torch.Tensor:
        gate_up_RF = multiply(rows_RH, w13, b13)
        return multiply(reference.clamped_swiglu(gate_up_RF, alpha=alpha, limit=limit), w2, b2)

    check = partial(validation.fused_swiglu_oai, hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, alpha, limit)
    weights = {"w13": w13, "b13": b13, "w2": w2, "b2": b2}
    return _sum_of_experts(swiglu_oai_experts, check, hidden_states, weights, topk_weights, topk_ids, mesh)


class _Products(NamedTuple):
    """The products of received rows with the matrices of their experts."""

    multiply: Callable[..., torch.Tensor]
    group_sizes: torch.Tensor

    def __call__(self, rows: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor | None = None) -> torch.Tensor:
        out = self.multiply(rows, weights, self.group_sizes)
        if biases is None:
            return out
        return out + _Spread.apply(biases, self.group_sizes, len(rows))


def _sum_of_experts(
    experts: Callable[[torch.Tensor, _Products], torch.Tensor],
    check: Callable[[], None],
    hidden_states: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """Send tokens to their experts, and add up what `experts` makes of them.

    Args:
        experts: From received rows, sorted by expert, and their products with what every expert has, to outputs.
        check: Raises what is wrong with this rank's call.
        weights: Of this rank's experts, by name; the first is a matrix.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}")
    routes = _route(check, hidden_states, weights, topk_ids, mesh)
    rows_RH = _Dispatch.apply(hidden_states, routes)
    out_RH = experts(rows_RH, _Products(_grouped_matmul_of(hidden_states), routes.group_sizes))
    return _Combine.apply(out_RH, topk_weights, hidden_states.dtype, routes)


class _Spread(torch.autograd.Function):
    """To each row its expert's bias; back, sums in the order of the rows, where autograd's would be atomics on a GPU."""

    @staticmethod
    def forward(ctx: Any, biases: torch.Tensor, group_sizes: torch.Tensor, num_rows: int) -> torch.Tensor:
        ctx.save_for_backward(group_sizes)
        ctx.dtype = biases.dtype
        return at_least_float32(biases).repeat_interleave(group_sizes, dim=0, output_size=num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (group_sizes,) = ctx.saved_tensors
        return torch.segment_reduce(d_rows.contiguous(), "sum", lengths=group_sizes).to(ctx.dtype), None, None


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
            weight_R1 = ctx.routes.to_experts(topk_weights.flatten()[order_N, None]).to(out_TKH.dtype)
            d_rows_RH = weight_R1 * ctx.routes.to_experts(d_out_TH[token_N]).to(out_TKH.dtype)
        if ctx.needs_input_grad[1]:
            d_topk_weights = (out_TKH * d_out_TH[:, None]).sum(dim=-1).to(topk_weights.dtype)
        return d_rows_RH, d_topk_weights, None, None


def _route(
    check: Callable[[], None],
    hidden_states: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    topk_ids: torch.Tensor,
    mesh: DeviceMesh,
) -> _Routes:
    """Check the call, here and on every rank; exchange how many rows go where, and which experts they are for."""
    ranks, error = mesh.size(), None
    ids_N = order_N = torch.empty(0, dtype=torch.int64, device=mesh.device_type)
    agreements = _agreements(weights)
    facts = dict.fromkeys(agreements, 1)
    first = next(iter(weights.values()))
    try:
        check()
        if hidden_states.device.type != mesh.device_type:
            raise ValueError(f"hidden_states must be on the device of mesh, {mesh.device_type}, got {hidden_states.device}")
        validation.expert_ids_in_range(topk_ids, num_experts=first.shape[0] * ranks)
    except (TypeError, ValueError) as raised:
        error = raised  # raised again once the other ranks know
    else:
        ids_N, order_N = topk_ids.flatten().to(torch.int64).sort(stable=True)
        dtype = validation.FLOATING.index(validation.dtype_name(hidden_states))
        tracked = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, *weights.values())]
        facts = dict(zip(agreements, (*first.shape, dtype, *tracked), strict=True))

    experts_here = facts[agreements[0]]
    # searches, since a bincount waits for the GPU
    sent_W = torch.searchsorted(ids_N, torch.arange(ranks + 1, device=ids_N.device) * experts_here).diff()
    sent, received = agree(sent_W, facts, error, mesh)
    group = mesh.get_group()
    ids_R, order_R = (_exchange(ids_N, sent, received, group) % experts_here).sort(stable=True)
    group_sizes = torch.searchsorted(ids_R, torch.arange(experts_here + 1, device=ids_R.device)).diff()
    return _Routes(order_N, order_R, group_sizes, sent, received, topk_ids.shape, group)


def _agreements(weights: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """What ranks must have alike: else they would wait for rows that nobody sends, or for a gradient that nobody computes."""
    first = next(iter(weights))
    return (
        f"{first} must hold the same number of experts (num_experts / world_size)",
        f"{first} must have the same number of rows",
        "hidden_states must have the same hidden_size",
        "hidden_states must have the same dtype",
        *(f"{name} must require a gradient alike" for name in ("hidden_states", *weights)),
    )


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
    return reference.grouped_matmul
