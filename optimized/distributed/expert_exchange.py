"""The exchange of expert-parallel experts: which rows go where, in how many parts, and the sum of what returns.

In more than one part, the experts of each rank are cut into so many runs. All parts' rows are sent at once; a part is multiplied
while the next ones' rows are on their way and the last one's return, forward and backward. An expert gets all of its rows in one
part, so that bits do not depend on how many there are; parts of the tokens would divide the sums that matrices' gradients are.

Shapes: T num_tokens of this rank, K top_k, N routed rows (T * K) of this rank, R rows that this rank's experts receive in a part,
W ranks, H hidden_size.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.collectives import begin_exchange, exchange
from gaugeblock.optimized.distributed.expert_calls import ExpertCall, require_one_dimension
from gaugeblock.reference.torch.precision import at_least_float32


def sum_of_experts(call: ExpertCall, mesh: DeviceMesh, parts: int = 1) -> torch.Tensor:
    """Send tokens to their experts, and add up what these make of them; [T, H], dtype as hidden_states."""
    routes = route(call, mesh, parts)
    return exchanged_sum(call, routes, call.hidden_states, call.topk_weights)


def exchanged_sum(call: ExpertCall, routes: "Routes", hidden_states: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """The same of tokens and weights that are the call's own, or these in float32; dtype as this hidden_states."""
    return _Sum.apply(hidden_states, topk_weights, call, routes, *call.weights.values())


class _Part(NamedTuple):
    """Which rows go to some of each rank's experts."""

    order_N: torch.Tensor  # routed rows of this rank, sorted by rank and expert
    order_R: torch.Tensor  # received rows, sorted by expert; of one expert, in the order of ranks and tokens
    group_sizes: torch.Tensor  # rows of each of this rank's experts in this part
    experts: slice  # which they are
    sent: Sequence[int]  # rows to each rank
    received: Sequence[int]  # rows from each rank
    group: dist.ProcessGroup

    def begin_to_experts(self, rows_NX: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to send rows, in order_N, to their experts; then rows received, sorted by expert, as float32 at least."""
        wait = begin_exchange(rows_NX, self.sent, self.received, self.group)
        return lambda: at_least_float32(wait()[self.order_R])

    def begin_from_experts(self, rows_RH: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to send rows, sorted by expert, back to their tokens; then those of this rank, in order_N."""
        return begin_exchange(
            torch.empty_like(rows_RH).index_copy_(0, self.order_R, rows_RH), self.received, self.sent, self.group
        )


class Routes(NamedTuple):
    """Which rows go where, part by part."""

    parts: list[_Part]
    shape: torch.Size  # [num_tokens, top_k]

    def begin_to_experts(self, rows_TX: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """Begin to send tokens' rows to all of their experts, part by part."""
        return [each.begin_to_experts(rows_TX[each.order_N // self.shape[1]]) for each in self.parts]

    def at_tokens(self, waits: Sequence[Callable[[], torch.Tensor]], like: torch.Tensor) -> torch.Tensor:
        """Wait for what returns of all parts, [T, K, H]."""
        rows_NH = like.new_empty(self.shape.numel(), like.shape[1])
        for part, wait in zip(self.parts, waits, strict=True):
            rows_NH.index_copy_(0, part.order_N, wait())
        return rows_NH.unflatten(0, self.shape)


class _Ran(NamedTuple):
    """What a part's experts were given, and where to begin its gradients."""

    leaves: list[torch.Tensor]  # rows, then weights
    edge: Any  # of the outputs, which need not be kept


class _Sum(torch.autograd.Function):
    """Tokens to their experts, through them, and back. Rows travel in the dtype that the weights have; outputs and gradients of
    tokens in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        call: ExpertCall,
        routes: Routes,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.call, ctx.routes, ctx.dtype = call, routes, hidden_states.dtype
        needed, ctx.ran, rows, returning = _needed(ctx), [], [], []
        for part, arrive in zip(routes.parts, routes.begin_to_experts(hidden_states.to(weights[0].dtype)), strict=True):
            rows.append(arrive())
            out_RH, ran = _run(call, part, rows[-1], weights, needed)
            ctx.ran.append(ran)
            returning.append(part.begin_from_experts(out_RH))
        out_TKH = routes.at_tokens(returning, rows[0])
        ctx.save_for_backward(out_TKH, topk_weights, *(rows if any(needed) else ()))
        return (topk_weights.to(out_TKH.dtype)[..., None] * out_TKH).sum(dim=1).to(call.out_dtype or ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out_TKH, topk_weights, *rows = ctx.saved_tensors
        d_hidden_states = d_topk_weights = None
        d_weights: list[torch.Tensor | None] = [None for _ in ctx.call.weights]
        if any(_needed(ctx)):
            d_hidden_states, d_weights = _gradients(ctx, d_out_TH, topk_weights, rows, out_TKH)
        if ctx.needs_input_grad[1]:
            d_topk_weights = (out_TKH * d_out_TH[:, None]).sum(dim=-1).to(topk_weights.dtype)
        return d_hidden_states, d_topk_weights, None, None, *d_weights


def _needed(ctx: Any) -> list[bool]:
    """Whether rows need a gradient, and each of the weights."""
    return [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]


def _run(
    call: ExpertCall, part: _Part, rows_RH: torch.Tensor, weights: Sequence[torch.Tensor], needed: Sequence[bool]
) -> tuple[torch.Tensor, _Ran]:
    """Run a part's experts on their rows; keep what their gradients need, if any is needed."""
    inputs = (rows_RH, *(each[part.experts] for each in weights))
    leaves = [each.detach().requires_grad_(need) for each, need in zip(inputs, needed, strict=True)]
    with torch.set_grad_enabled(any(needed)):
        out_RH = call.outputs(leaves[0], part.group_sizes, dict(zip(call.weights, leaves[1:], strict=True)))
    return out_RH.detach(), _Ran(leaves, get_gradient_edge(out_RH)) if any(needed) else _Ran([], None)


def _gradients(
    ctx: Any, d_out_TH: torch.Tensor, topk_weights: torch.Tensor, rows: Sequence[torch.Tensor], like: torch.Tensor
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Send gradients of outputs to the experts; return those of tokens, which come back, and of weights, which stay here."""
    call, routes, needed = ctx.call, ctx.routes, _needed(ctx)
    weights = [*call.weights.values()]
    ran, ctx.ran = ctx.ran or [None for _ in routes.parts], []  # freed as autograd frees: what is run again gives the same bits
    arriving_weights = [each.begin_to_experts(topk_weights.flatten()[each.order_N, None]) for each in routes.parts]
    arriving = routes.begin_to_experts(d_out_TH.to(weights[0].dtype))
    returning, of_parts = [], []
    for index, part in enumerate(routes.parts):
        d_rows_RH = arriving_weights[index]().to(like.dtype) * arriving[index]()
        leaves, edge = ran[index] or _run(call, part, rows[index], weights, needed)[1]
        ran[index] = None
        found = iter(torch.autograd.grad([edge], [each for each in leaves if each.requires_grad], [d_rows_RH]))
        d_leaves = [next(found) if each.requires_grad else None for each in leaves]
        of_parts.append(d_leaves[1:])
        if needed[0]:
            returning.append(part.begin_from_experts(d_leaves[0]))
    d_weights = [
        None if each[0] is None else torch.cat(each) if len(each) > 1 else each[0] for each in zip(*of_parts, strict=True)
    ]
    if not needed[0]:
        return None, d_weights
    return routes.at_tokens(returning, like[:, 0]).sum(dim=1).to(ctx.dtype), d_weights


def route(call: ExpertCall, mesh: DeviceMesh, parts: int = 1, *, error: Exception | None = None) -> Routes:
    """Check the call, here and on every rank; exchange how many rows go where, and which experts they are for.

    Args:
        error: What is known to be wrong already.
    """
    require_one_dimension(mesh)
    ranks, group = mesh.size(), mesh.get_group()
    error = error or call.error(mesh, num_holders=ranks)
    if error is None and (not isinstance(parts, int) or parts < 1):
        error = ValueError(f"parts must be a positive integer, got {parts!r}")
    ids_N = order_N = torch.empty(0, dtype=torch.int64, device=mesh.device_type)
    experts_here = 1
    if error is None:
        ids_N, order_N = call.topk_ids.flatten().to(torch.int64).sort(stable=True)
        experts_here = call.num_experts

    # searches, since a bincount waits for the GPU
    sent_W = torch.searchsorted(ids_N, torch.arange(ranks + 1, device=ids_N.device) * experts_here).diff()
    facts = call.facts(error) | {"parts must be the same": parts if error is None else 1}
    sent, received = agree(sent_W, facts, error, mesh)
    local_R = exchange(ids_N, sent, received, group) % experts_here
    parts = min(parts, experts_here)
    bounds = [experts_here * each // parts for each in range(parts + 1)]
    here, there = _edges(ids_N, local_R, sent, received, experts_here, bounds)
    made = []
    for index, (first, end) in enumerate(pairwise(bounds)):
        mine, theirs = ([(edges[index], edges[index + 1]) for edges in side] for side in (here, there))
        ids_R, order_R = _pieces(local_R, theirs).sort(stable=True)
        group_sizes = torch.searchsorted(ids_R, torch.arange(first, end + 1, device=ids_R.device)).diff()
        to_each, from_each = ([stop - start for start, stop in side] for side in (mine, theirs))
        made.append(_Part(_pieces(order_N, mine), order_R, group_sizes, slice(first, end), to_each, from_each, group))
    return Routes(made, call.topk_ids.shape)


def _edges(
    ids_N: torch.Tensor,
    local_R: torch.Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    experts_here: int,
    bounds: Sequence[int],
) -> tuple[list[list[int]], list[list[int]]]:
    """Where each part begins, and the last one ends, among the rows to each rank, and from each; [W, parts + 1].

    The host waits for it, if there is more than one part.
    """
    if len(bounds) == 2:
        here, there = ([list(each) for each in pairwise(accumulate(counts, initial=0))] for counts in (sent, received))
        return here, there
    device, ranks = ids_N.device, len(sent)
    wanted = torch.arange(ranks, device=device)[:, None] * experts_here + torch.tensor(bounds, device=device)
    rank_R = torch.arange(ranks, device=device).repeat_interleave(torch.tensor(received, device=device))
    here, there = torch.stack(
        [torch.searchsorted(sorted_ids, wanted) for sorted_ids in (ids_N, rank_R * experts_here + local_R)]
    ).tolist()
    return here, there


def _pieces(rows: torch.Tensor, edges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Some pieces of rows, one behind the other."""
    return _joined([rows[start:stop] for start, stop in edges])


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([*tensors]) if len(tensors) > 1 else tensors[0]
