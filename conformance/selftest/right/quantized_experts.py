"""Right but different quantized experts."""

import torch
from torch.nn.functional import silu

from gaugeblock.conformance.selftest.simulated.quantized_experts import Fp8Experts, Int8Experts
from gaugeblock.conformance.selftest.variant import right


@right()
class WeightsScaledFirst(Int8Experts):
    """Weights are scaled in float32, and multiplied so."""


@right()
class ScaledWeightsRounded(Int8Experts):
    """Scaled weights are rounded to the dtype of the tokens, as a kernel does that hands them to matrix units."""

    def __call__(self, hidden_states, *others):
        self.dtype = hidden_states.dtype
        return super().__call__(hidden_states, *others)

    def scaled(self, weights, scales):
        return super().scaled(weights, scales).to(self.dtype).float()


@right("quantized_experts.fused_swiglu_int8", batch_invariant=False)
class SumsScaledLast:
    """Plain PyTorch in float32, one expert at a time; results of a product of integers are scaled."""

    def __call__(self, hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids):
        hidden = hidden_states.float()
        total = torch.zeros_like(hidden)
        for expert in range(len(w13)):
            tokens, choices = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (w13_scales[expert] * (hidden[tokens] @ w13[expert].float().mT)).chunk(2, 1)
            out = w2_scales[expert] * ((silu(gate) * up) @ w2[expert].float().mT)
            total = total.index_add(0, tokens, topk_weights[tokens, choices, None].float() * out)
        return total.to(hidden_states.dtype)


@right()
class BlocksScaledFirst(Fp8Experts):
    """Weights are scaled in float32, and multiplied so."""


@right(dtypes=("bfloat16",))
class GateAndUpInBfloat16(Fp8Experts):
    """The first product is stored in bfloat16, as between two kernels."""

    def split(self, gate_up):
        return super().split(gate_up.bfloat16().float())


@right()
class SumsOfBlocksScaled(Fp8Experts):
    """Products of a block of the depth are added up alone, and scaled then, as matrix units do it."""

    def tiles(self, left, right):
        return list(zip(left.split(self.block_size, 1), right.split(self.block_size, 1), strict=True))
