"""Experts in any layout of a model over ranks: experts over some of them, slices of an expert over others, and parts of a batch.

Ranks of a tensor-parallel group have the same tokens, as behind a tensor-parallel attention. Where each holds experts of its own,
it sends its part of these tokens to whoever holds their experts, in this data-parallel shard or any, and the group gathers what
returns. So data-parallel shards may have any tokens, and as many as they like. Where it holds slices, each sends all tokens,
multiplies with its slice, and the group adds up the returned sums in float32.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import expert_calls, expert_exchange, experts_replicated_tokens, experts_tensor_parallel
from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.collectives import SumOverRanks, gather_rows, replicated
from gaugeblock.optimized.parallel_layout import ParallelLayout

TOKENS = ("hidden_states", "topk_weights", "topk_ids")  # what every token has


def meshes_of(layout: ParallelLayout, device_type: str) -> dict[str, DeviceMesh]:
    """Build the meshes of a layout, on every rank in the same order: by "tp", "dp" and "ep" the one of this rank's group.

    Raises:
        ValueError: There are not as many ranks as the layout takes.
    """
    if dist.get_world_size() != layout.world_size:
        raise ValueError(f"layout takes world_size {layout.world_size}, got {dist.get_world_size()}: {layout}")
    ways: tuple[Any, ...] = ("tp", "dp", "ep")
    return {way: DeviceMesh(device_type, torch.tensor(layout.groups(way)), mesh_dim_names=("groups", way))[way] for way in ways}


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    layout: ParallelLayout,
    meshes: Mapping[str, DeviceMesh],
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts, which lie on ranks as a layout says, to the tokens of this rank's data-parallel shard.

    As `gaugeblock.optimized.distributed.experts.fused_swiglu`, but for which rank has what. Gradients of hidden_states and
    topk_weights are the whole ones on every rank of a tensor-parallel group; those of experts that several groups hold are to be
    added up over these.

    Args:
        hidden_states: [num_tokens of this shard, hidden_size], the same on the ranks of a tensor-parallel group; any number.
        w13: [experts, 2 * features, hidden_size]: those of `layout.experts_of` and `layout.features_of` this rank, cut by
            `parallel_layout.slice_of_gate_and_up`.
        w2: [experts, hidden_size, features].
        topk_weights: [num_tokens of this shard, top_k].
        topk_ids: [num_tokens of this shard, top_k], of all experts.
        layout: Which rank has what.
        meshes: Of `meshes_of` this layout.

    Returns:
        [num_tokens of this shard, hidden_size], dtype as hidden_states, the same on the ranks of a tensor-parallel group.

    Raises:
        TypeError, ValueError: As `experts.fused_swiglu`, on all ranks that exchange anything.
    """
    call = expert_calls.swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    if layout.kind == "base_model_only":
        way = experts_tensor_parallel if layout.expert_tp_size > 1 else experts_replicated_tokens
        return way.sum_of_experts(call, meshes["tp"])
    if layout.kind == "ep_times_tp":
        return _sum_over_slices(call, meshes["ep"], meshes["tp"])
    return _gathered_sum(call, meshes["ep"], meshes["tp"])


def _sum_over_slices(call: expert_calls.ExpertCall, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> torch.Tensor:
    """Every rank sends all tokens to its slice of their experts; the ranks that have the same tokens add up what returns."""
    routes = expert_exchange.route(call, ep_mesh, error=_disagreement(call, ep_mesh, tp_mesh))
    group = tp_mesh.get_group()
    hidden_states, topk_weights = replicated(group, call.hidden_states, call.topk_weights)
    out_TH = expert_exchange.exchanged_sum(call, routes, hidden_states, topk_weights)
    return SumOverRanks.apply(out_TH, group).to(call.hidden_states.dtype)


def _gathered_sum(call: expert_calls.ExpertCall, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> torch.Tensor:
    """Every rank sends its part of the tokens to their experts; the ranks that have the same tokens gather what returns."""
    error, group = _disagreement(call, ep_mesh, tp_mesh), tp_mesh.get_group()
    sizes: list[int] = []
    if error is None:
        sizes = [len(each) for each in call.topk_ids.tensor_split(tp_mesh.size())]
        call = call._replace(**{name: _Part.apply(getattr(call, name), sizes, group) for name in TOKENS})
    routes = expert_exchange.route(call, ep_mesh, error=error)
    return _Gather.apply(expert_exchange.exchanged_sum(call, routes, call.hidden_states, call.topk_weights), sizes, group)


def _disagreement(call: expert_calls.ExpertCall, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> TypeError | ValueError | None:
    """What is wrong with the call of any rank that has the same tokens; the exchange of tokens tells it to all others."""
    error = call.error(tp_mesh, num_holders=ep_mesh.size())
    nothing = torch.zeros(tp_mesh.size(), dtype=torch.int64, device=tp_mesh.device_type)
    try:
        agree(nothing, call.facts(error, tokens_alike=True), error, tp_mesh)
    except (TypeError, ValueError) as raised:
        return raised
    return None


class _Part(torch.autograd.Function):
    """This rank's part of rows that all ranks have; back, all ranks get all parts' gradients."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sizes, ctx.group = sizes, group
        return rows.split(sizes)[dist.get_rank(group)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_part: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gather_rows(d_part, ctx.sizes, ctx.group), None, None


class _Gather(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> torch.Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather_rows(part, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return d_rows.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None
