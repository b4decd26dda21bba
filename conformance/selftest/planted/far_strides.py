"""Offsets in 32 bits, in simulated kernels and in the text of our own."""

import torch

from gaugeblock.conformance.selftest.edits import mutant
from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.conformance.selftest.simulated.routers import SoftmaxRouter

SOFTMAX, EXPERTS = "routers.softmax_topk", "experts.fused_swiglu"


def in_32_bits(number: int) -> torch.Tensor:
    """What is left of a number in an int32."""
    return torch.tensor((number + 2**31) % 2**32 - 2**31, dtype=torch.int32)


def read_by_32_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements at `row * stride`, computed in int32 along the first dimension."""
    offsets = torch.arange(len(tensor), dtype=torch.int32) * in_32_bits(tensor.stride(0))
    shape, stride, start = tensor.shape[1:], tensor.stride()[1:], tensor.storage_offset()
    rows = [tensor.as_strided(shape, stride, start + int(offset)) for offset in offsets]
    return torch.stack(rows) if rows else tensor


@fault(caught_by="far_strides", kind="memory", source="vLLM fused_moe fixes", differentiable=False)
class RowOffsetsIn32Bits(SoftmaxRouter):
    """The row times its stride is an int32."""

    def load(self, logits):
        return super().load(read_by_32_bits(logits))


@fault(caught_by="far_strides", kind="memory", source="vLLM fused_moe fixes", differentiable=False)
class ExpertOffsetsIn32Bits(Experts):
    """The expert times the stride of w13 is an int32."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        self.validate(hidden_states, w13, w2, topk_weights, topk_ids)
        return super().__call__(hidden_states, read_by_32_bits(w13), w2, topk_weights, topk_ids)


mutant(
    SOFTMAX, "row-offsets-in-32-bits", "The row times its stride is an int32.", "launch.program_rows",
    ".to(tl.int64)", "", "far_strides", "memory", "vLLM fused_moe fixes",
)  # fmt: skip
mutant(
    EXPERTS, "expert-offsets-in-32-bits", "The expert times the stride of w13 is an int32.",
    "expert_products._tile_of_first_product", "expert * w1_expert_stride",
    "expert.to(tl.int32) * w1_expert_stride", "far_strides", "memory",
    "vLLM fused_moe fixes",
)  # fmt: skip
