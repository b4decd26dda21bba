"""Liger's kernels on trial; imported only where liger-kernel is installed."""

import torch
from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer


@peer("experts.fused_swiglu", dtypes=DTYPES, right_in=("float16", "bfloat16"), kind="triton", rounding="eager")
class LigerFusedExperts:
    """Liger's fused experts, whose ids are int32."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        return LigerFusedMoEFunction.apply(hidden_states, w13, w2, topk_ids.to(torch.int32), topk_weights)
