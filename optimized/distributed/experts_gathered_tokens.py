"""Experts over ranks that gather all tokens: each runs the experts it holds on whatever chose them, and returns sums.

Tokens, their weights and ids go to every rank, in their dtypes; what each rank's experts give to each token is added up over the
ranks in float32, and goes to the token's rank alone. Forward, a row of bfloat16 costs 2 + 4 bytes a column for each other rank;
the exchange of `experts.py` costs 6 for each choice on another rank: gathering pays where top_k is not less than world_size, and
where the even load of its links is worth more than its bytes.

Before, one small all-to-all tells how many tokens each rank has, and whether all ranks made the same good call. The host waits
for it, for the range of the ids, and for how many rows this rank's experts have. A rank without tokens takes part in everything.

Bits do not depend on the other tokens. They depend on how many ranks there are: a token's sum is added up rank by rank.
"""

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from gaugeblock.optimized.distributed import expert_calls
from gaugeblock.optimized.distributed.agreement import agree
from gaugeblock.optimized.distributed.collectives import SumOfRows, gather_rows, gathered
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
    """Apply the chosen SwiGLU experts, which lie on all ranks, to each token of this rank; add up their weighted outputs.

    As `gaugeblock.optimized.distributed.experts.fused_swiglu`, in arguments, results and errors; rows travel another way, and
    bits depend on the number of ranks.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`; the exchange is that of Megatron-LM's MoEAllGatherTokenDispatcher.
    """
    return sum_of_experts(expert_calls.swiglu(hidden_states, w13, w2, topk_weights, topk_ids), mesh)


def sum_of_experts(call: expert_calls.ExpertCall, mesh: DeviceMesh) -> torch.Tensor:
    """Gather the tokens, run this rank's experts on those that chose them, and send each rank its tokens' sums."""
    expert_calls.require_one_dimension(mesh)
    error, group = call.error(mesh, num_holders=mesh.size()), mesh.get_group()
    num_tokens = len(call.hidden_states) if error is None else 0
    mine = torch.full((mesh.size(),), num_tokens, dtype=torch.int64, device=mesh.device_type)
    _, sizes = agree(mine, call.facts(error), error, mesh)

    experts_here = call.num_experts
    topk_ids = gather_rows(call.topk_ids.to(torch.int64), sizes, group)
    rows = rows_of_experts(topk_ids, mesh.get_local_rank() * experts_here, experts_here)
    hidden_states, topk_weights = gathered(sizes, group, call.hidden_states, call.topk_weights)
    return SumOfRows.apply(rows.sums(call, hidden_states, topk_weights), call.dtype, sizes, group)


# as fused_swiglu here, of what `gaugeblock.reference.torch.experts` computes under these names
fused_geglu = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.geglu)
fused_gelu_mlp = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.gelu_mlp)
fused_swiglu_oai = partial(expert_calls.over_ranks, sum_of_experts, expert_calls.swiglu_oai)
