"""Experts over ranks that all have the same tokens: each runs the experts it holds, whole, and adds its part to all ranks' sum.

No row of a token travels; what the ranks add up are float32 sums over a token's choices, [num_tokens, hidden_size] once forward,
and backward the gradients of tokens and their weights, once for both. That is less than what an exchange of tokens moves where a
token has many choices, and the tokens are on every rank anyway, as behind a tensor-parallel attention.

Besides, one small all-to-all tells whether all ranks made the same good call. The host waits for it, for the range of the ids,
and for how many rows this rank's experts have.

Bits do not depend on the other tokens, and are the same on every rank. They depend on how many ranks there are: a token's sum is
added up rank by rank.
"""

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import expert_calls
from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.collectives import SumOverRanks, replicated
from gaugeblock.optimized.distributed.local_experts import rows_of_experts


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts, which lie on all ranks, to tokens that all ranks have; add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Every rank of the mesh calls it with the same tokens, and calls backward where one does. Differentiable once, in all but
    topk_ids; the gradients of hidden_states and topk_weights are the whole ones on every rank. On a GPU, operands of matrix
    products are rounded to the dtype of hidden_states; all else is float32 (float64 for float64 inputs) and rounded once.

    Args:
        hidden_states: [num_tokens, hidden_size], floating, the same on every rank; w13 and w2 have its dtype.
        w13: [num_experts / world_size, 2 * intermediate_size, hidden_size], gate rows, then up rows; rank r holds the experts
            from r * num_experts / world_size on.
        w2: [num_experts / world_size, hidden_size, intermediate_size].
        topk_weights: [num_tokens, top_k], floating, usually float32; the same on every rank.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1, of all ranks' experts; the same on every rank.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; the same on every rank.

    Raises:
        TypeError: An argument of this rank is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert; or another rank's call raises, or does
            not fit to this one. Then all ranks raise, before any row travels.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`; the layout is that of DeepSeek-V3's inference/model.py, MoE.
    """
    return sum_of_experts(expert_calls.swiglu(hidden_states, w13, w2, topk_weights, topk_ids), mesh)


def sum_of_experts(call: expert_calls.ExpertCall, mesh: DeviceMesh) -> torch.Tensor:
    """Run this rank's experts on the tokens that chose them; add up the ranks' parts."""
    expert_calls.require_one_dimension(mesh)
    error, group = call.error(mesh, num_holders=mesh.size()), mesh.get_group()
    agree(torch.zeros(mesh.size(), dtype=torch.int64, device=mesh.device_type), call.facts(error, tokens_alike=True), error, mesh)

    experts_here = call.num_experts
    rows = rows_of_experts(call.topk_ids, mesh.get_local_rank() * experts_here, experts_here)
    hidden_states, topk_weights = replicated(group, call.hidden_states, call.topk_weights)
    return SumOverRanks.apply(rows.sums(call, hidden_states, topk_weights), group).to(call.dtype)


# as fused_swiglu here, of what `gaugeblock.reference.torch.experts` computes under these names
fused_geglu = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.geglu)
fused_gelu_mlp = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.gelu_mlp)
fused_swiglu_oai = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.swiglu_oai)
