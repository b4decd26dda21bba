"""Tensor-parallel experts: every rank has all tokens and a slice of each expert, and adds its part to all ranks' sum.

A rank holds the gate and up rows of some of the intermediate features, and the columns of w2 that multiply them. What the ranks
add up are float32 sums over a token's choices, once forward, and backward the gradients of tokens and their weights, once for
both: 8 * (world_size - 1) / world_size bytes a column of a token each, whatever the dtype; 4 * (world_size - 1) of few tokens, in
one exchange (`collectives.py`). The biases that come last, which every rank has whole, are added by each to the sum; no rank's
part has them, and their gradients are complete everywhere.

Besides, one small all-to-all tells whether all ranks made the same good call. The host waits for it, for the range of the ids,
and for how many rows there are.

Bits do not depend on the other tokens, and are the same on every rank. They depend on how many ranks there are: a sum over the
intermediate features is added up rank by rank.
"""

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import expert_calls
from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.collectives import SumOverRanks, replicated
from gaugeblock.optimized.distributed.local_experts import rows_of_experts
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
    """Apply the chosen SwiGLU experts, of which each rank has a slice, to each token; add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Every rank of the mesh calls it with the same tokens, and calls backward where one does. Differentiable once, in all but
    topk_ids; the gradients of hidden_states and topk_weights are the whole ones on every rank. On a GPU, operands of matrix
    products are rounded to the dtype of hidden_states; all else is float32 (float64 for float64 inputs) and rounded once.

    Args:
        hidden_states: [num_tokens, hidden_size], floating, the same on every rank; w13 and w2 have its dtype.
        w13: [num_experts, 2 * intermediate_size / world_size, hidden_size], gate rows, then up rows; rank r holds those of the
            intermediate features from r * intermediate_size / world_size on (`parallel_layout.slice_of_gate_and_up`).
        w2: [num_experts, hidden_size, intermediate_size / world_size], the columns of the same features.
        topk_weights: [num_tokens, top_k], floating, usually float32; the same on every rank.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1; the same on every rank.
        mesh: One-dimensional; its device type is that of the tensors.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; the same on every rank.

    Raises:
        TypeError: An argument of this rank is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert; or another rank's call raises, or does
            not fit to this one. Then all ranks raise, before any row travels.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`; the slices are those of Megatron-LM (arXiv:1909.08053) section 3.
    """
    return sum_of_experts(expert_calls.swiglu(hidden_states, w13, w2, topk_weights, topk_ids), mesh)


def sum_of_experts(call: expert_calls.ExpertCall, mesh: DeviceMesh) -> torch.Tensor:
    """Run all experts on this rank's features; add up the ranks' parts."""
    expert_calls.require_one_dimension(mesh)
    error, group = call.error(mesh, num_holders=1), mesh.get_group()
    agree(torch.zeros(mesh.size(), dtype=torch.int64, device=mesh.device_type), call.facts(error, tokens_alike=True), error, mesh)

    rows = rows_of_experts(call.topk_ids, 0, call.num_experts)
    hidden_states, topk_weights = replicated(group, call.hidden_states, call.topk_weights)
    out_TH = SumOverRanks.apply(rows.sums(call, hidden_states, topk_weights, down_biases=False), group)
    if call.down[1]:
        out_TH = out_TH + rows.sums_of_biases(call, at_least_float32(call.topk_weights))
    return out_TH.to(call.dtype)


# as fused_swiglu here, of what `gaugeblock.reference.torch.experts` computes under these names; a rank's part of b1 and b13 goes
# with its rows of w1 and w13, which in turns lie side by side, and b2 is whole on every rank
fused_geglu = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.geglu)
fused_gelu_mlp = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.gelu_mlp)
fused_swiglu_oai = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.swiglu_oai)
