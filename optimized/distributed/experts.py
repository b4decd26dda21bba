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

What the exchange is made of stands in `expert_exchange.py`, what an expert does to a row in `expert_calls.py`.
"""

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import expert_calls
from gaugeblock.optimized.distributed.expert_exchange import sum_of_experts


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    mesh: DeviceMesh,
    parts: int = 1,
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
        parts: In how many parts rows travel, one while another is multiplied; the same on every rank. Bits do not depend on it.

    Returns:
        [num_tokens of this rank, hidden_size], dtype as hidden_states.

    Raises:
        TypeError: An argument of this rank is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert; or another rank's call raises, or does
            not fit to this one. Then all ranks raise, before any row travels.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`; the exchange is that of GShard (arXiv:2006.16668) section 3.2,
    without capacities.
    """
    return sum_of_experts(expert_calls.swiglu(hidden_states, w13, w2, topk_weights, topk_ids), mesh, parts)


def fused_swiglu_overlapped(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    mesh: DeviceMesh,
) -> torch.Tensor:
    """As `fused_swiglu`, in two parts: one is multiplied while the other travels."""
    return fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids, mesh=mesh, parts=2)


# as fused_swiglu here, of what `gaugeblock.reference.torch.experts` computes under these names
fused_geglu = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.geglu)
fused_gelu_mlp = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.gelu_mlp)
fused_swiglu_oai = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.swiglu_oai)
