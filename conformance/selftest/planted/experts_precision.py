"""Bugs of experts that lose precision, and wrong gradients."""

from typing import Any

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.planted.routers_interface import ContiguousCotangent
from gaugeblock.conformance.selftest.simulated.experts import Experts

HALF, BFLOAT = ("float16",), ("bfloat16",)


@fault(caught_by="parity", kind="precision", source="pytorch/helion#2141", dtypes=BFLOAT)
class Bfloat16Accumulator(Experts):
    """The sum is rounded to bfloat16 after each tile."""

    def add(self, total, product):
        return super().add(total, product).bfloat16().float()


@fault(caught_by="parity", kind="precision", source="pytorch/helion#2141", dtypes=HALF)
class Float16Accumulator(Experts):
    """The sum is rounded to float16 after each tile."""

    def add(self, total, product):
        return super().add(total, product).half().float()


@fault(caught_by="parity", kind="precision", source="pytorch/helion#2141", dtypes=BFLOAT)
class Bfloat16AccumulatorOfTheSecondProduct(Experts):
    """The first product adds in float32, the second in bfloat16."""

    def accumulate(self, left, right):
        self.short = left.shape[1] != self.hidden_size
        return super().accumulate(left, right)

    def gather(self, hidden_states, tokens):
        self.hidden_size = hidden_states.shape[1]
        return super().gather(hidden_states, tokens)

    def add(self, total, product):
        total = super().add(total, product)
        return total.bfloat16().float() if self.short else total


@fault(caught_by="parity", kind="precision", source="triton#11217", dtypes=BFLOAT)
class OutputTruncated(Experts):
    """The result is cut to bfloat16, not rounded."""

    def store(self, total, hidden_states):
        return (total.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


@fault(caught_by="parity", kind="precision", source="triton#5895")
class Tf32(Experts):
    """Operands of float32 products are rounded to tf32, which has 10 bits."""

    def dot(self, left, right):
        return super().dot(tf32(left), tf32(right))


def tf32(x: torch.Tensor) -> torch.Tensor:
    """`x` rounded to nearest with 10 bits after the point."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


@fault(caught_by="parity", kind="precision", source="float32 through bf16 matrix units")
class OneBfloat16PassForFloat32(Experts):
    """Float32 products are made of the high halves of their operands alone."""

    def dot(self, left, right):
        return super().dot(left.bfloat16().float(), right.bfloat16().float())


@fault(caught_by="parity", kind="precision", source="tanh.approx and polynomial sigmoids", dtypes=HALF)
class ActivationTwoThousandthsOff(Experts):
    """The activation is 0.2 % too large."""

    def activate(self, gate, up):
        return 1.002 * super().activate(gate, up)


@fault(caught_by="parity", kind="precision", source="fp8 weights' scales", dtypes=BFLOAT)
class ResultTwoThousandthsOff(Experts):
    """The result is 0.2 % too small."""

    def store(self, total, hidden_states):
        return super().store(0.998 * total, hidden_states)


@fault(caught_by="parity", kind="precision", source="fp8 activations that nobody asked for", dtypes=BFLOAT)
class ActivationInEightBits(Experts):
    """What the second product gets passes through float8_e4m3."""

    def activate(self, gate, up):
        return super().activate(gate, up).to(torch.float8_e4m3fn).float()


@fault(caught_by="parity", kind="precision", source="eager ports", dtypes=BFLOAT)
class GateAndUpRounded(Experts):
    """Gate and up are rounded to bfloat16 before the activation: `eager` precision where `strict` is claimed."""

    def split(self, gate_up):
        return super().split(gate_up.bfloat16().float())


@fault(caught_by="parity", kind="precision", source="vLLM's moe_sum in the model's dtype", dtypes=BFLOAT)
class CombineInLowPrecision(Experts):
    """Each choice's weighted output is rounded to bfloat16 and added in bfloat16."""

    def combine(self, outs, topk_weights):
        total = torch.zeros(outs.shape[0], outs.shape[2], dtype=torch.bfloat16)
        for choice in range(outs.shape[1]):
            total = total + (topk_weights[:, choice, None] * outs[:, choice]).bfloat16()
        return total.float()


@fault(caught_by="parity", kind="precision", source="weights cast to the wrong dtype", dtypes=HALF)
class RouterWeightsInBfloat16(Experts):
    """The router weights of a float16 model pass through bfloat16."""

    def combine(self, outs, topk_weights):
        return super().combine(outs, topk_weights.bfloat16().float())


@fault(caught_by="parity", kind="precision", source="flush-to-zero in the epilogue", dtypes=HALF)
class SubnormalsFlushed(Experts):
    """Results below float16's smallest normal number become 0."""

    def store(self, total, hidden_states):
        return super().store(torch.where(total.abs() < 2.0**-14, 0 * total, total), hidden_states)


@fault(caught_by="parity", kind="structural", dtypes=HALF)
class ResultInFloat32(Experts):
    """The result keeps the accumulator's dtype."""

    def store(self, total, hidden_states):
        return total


@fault(caught_by="gradients", kind="gradient")
class RouterWeightsWithoutGradient(Experts):
    """The router weights get no gradient, so the router never learns."""

    def combine(self, outs, topk_weights):
        return super().combine(outs, topk_weights.detach())


@fault(caught_by="gradients", kind="gradient", smallest=2)
class SiluWithoutTheProductRule(Experts):
    """silu' is taken for the sigmoid: gate · sigmoid' is missing."""

    def activate(self, gate, up):
        return gate * gate.sigmoid().detach() * up


@fault(caught_by="gradients", kind="gradient")
class SiluGradientOnePercentOff(Experts):
    """silu' is 1 % too large."""

    def activate(self, gate, up):
        silu = torch.nn.functional.silu(gate)
        return (silu + 0.01 * (silu - silu.detach())) * up


@fault(caught_by="gradients", kind="gradient")
class WeightGradientMissesTheLastToken(Experts):
    """The loop over an expert's rows ends one row early in the gradient of w13."""

    def expert(self, hidden, w13, w2, weights, dtype):
        rows = len(weights) - 1
        first = super().expert(hidden[:rows], w13, w2, weights, dtype)
        return torch.cat([first, super().expert(hidden[rows:], w13.detach(), w2, weights, dtype)])


@fault(caught_by="gradients", kind="gradient", smallest=8)
class TokenGradientOfTheFirstChoice(Experts):
    """The gradient of a token is that through its first expert; the others are not added."""

    def dispatch(self, topk_ids, num_experts):
        self.top_k = topk_ids.shape[1]
        rows, offsets = super().dispatch(topk_ids, num_experts)
        self.routed = iter([rows[start:end] for _, start, end in self.blocks(offsets)] or [rows])
        return rows, offsets

    def gather(self, hidden_states, tokens):
        first = next(self.routed) % self.top_k == 0
        rows = hidden_states[tokens]
        rows = torch.where(first[:, None], rows, rows.detach())
        return super().gather(rows, torch.arange(len(rows)))


@fault(caught_by="gradients", kind="gradient")
class GradientsOfExpertsMixedUp(Experts):
    """The gradient of w2 is written to the next expert's place."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        return super().__call__(
            hidden_states, w13, w2 + (w2.roll(1, 0) - w2.roll(1, 0).detach()) - (w2 - w2.detach()), topk_weights, topk_ids
        )


@fault(caught_by="gradients", kind="gradient", source="pytorch/helion#2141", dtypes=BFLOAT)
class WeightGradientAddedInBfloat16(Experts):
    """The gradient of w13 is added up in bfloat16, one block of rows after the other."""

    def validate(self, *inputs):
        super().validate(*inputs)
        self.used = {}

    def expert(self, hidden, w13, w2, weights, dtype):
        w13 = self.used[w13.data_ptr()] = RoundedGradient.apply(self.used.get(w13.data_ptr(), w13))
        return super().expert(hidden, w13, w2, weights, dtype)


class RoundedGradient(torch.autograd.Function):
    """The identity; backward rounds to bfloat16, and so all that was added up so far if it is applied again and again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.bfloat16().float()


@fault(caught_by="gradient_subsets", kind="gradient", source="needs_input_grad misread")
class NoWeightGradientWithoutTokenGradient(Experts):
    """The backward pass returns early if the tokens need no gradient, as in training the first layer or frozen embeddings."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        if not hidden_states.requires_grad:
            w13 = w13.detach()
        return super().__call__(hidden_states, w13, w2, topk_weights, topk_ids)


@fault(caught_by="gradient_layout", kind="gradient")
class StridesOfTheCotangentIgnored(Experts):
    """The backward pass reads the gradient of the output as if its rows lay one behind the other."""

    def store(self, total, hidden_states):
        return ContiguousCotangent.apply(super().store(total, hidden_states))


@fault(caught_by="gradient_layout", kind="gradient", source="Liger-Kernel#1377: strided MoE weights")
class GradientOfStridedWeightsScrambled(Experts):
    """The gradient of w2 is written row by row into memory that has the strides of w2."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        return super().__call__(hidden_states, w13, StridedGradient.apply(w2), topk_weights, topk_ids)


class StridedGradient(torch.autograd.Function):
    """The identity; backward fills memory of the input's strides in the order of addresses."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.like = torch.empty_like(x)  # keeps the strides of dense memory, transposed for instance
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        filled = torch.empty_like(ctx.like)
        filled.as_strided((grad.numel(),), (1,)).copy_(grad.flatten())
        return filled
