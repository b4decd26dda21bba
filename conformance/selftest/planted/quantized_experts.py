"""Bugs of quantized experts: scales in the wrong place, and weights read as what they are not."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.quantized_experts import Fp8Experts, Int8Experts


@fault(caught_by="parity", kind="structural", source="vllm#57092")
class ScalesOfTheFirstExpert(Int8Experts):
    """Every expert has the scales of expert 0."""

    def scaled(self, weights, scales):
        return super().scaled(weights, scales[:1].expand_as(scales))


@fault(caught_by="parity", kind="structural", source="fused gate and up, of which a loader knows one scale")
class UpsHaveTheScalesOfGates(Int8Experts):
    """The scales of up rows are never read."""

    def scaled_gate_up(self, w13, scales):
        gates = scales[:, : scales.shape[1] // 2]
        return self.scaled(w13, torch.cat([gates, gates], 1))


@fault(caught_by="parity", kind="structural", source="layout guessed by shape where sizes are equal")
class ScalesAlongColumnsOfSquareWeights(Int8Experts):
    """Where a matrix is square, scales are taken for those of its columns."""

    def scaled(self, weights, scales):
        square = weights.shape[1] == weights.shape[2] > 1
        return weights * scales[:, None].float() if square else super().scaled(weights, scales)


@fault(caught_by="parity", kind="structural", source="uint8 weights with a zero point of 128")
class WeightsWithoutSigns(Int8Experts):
    """Weights are read as integers of 0 to 255."""

    def scaled(self, weights, scales):
        return super().scaled(weights.view(torch.uint8), scales)


@fault(caught_by="parity", kind="boundary", source="symmetric quantizers that never make -128")
class LeastWeightClamped(Int8Experts):
    """-128 is taken for -127."""

    def scaled(self, weights, scales):
        return super().scaled(weights.clamp(min=-127), scales)


@fault(caught_by="parity", kind="structural", source="scales that a shape without them broadcasts to")
class OneScaleForAnExpert(Int8Experts):
    """All rows of an expert have the scale of its first."""

    def scaled(self, weights, scales):
        return super().scaled(weights, scales[:, :1].expand_as(scales))


@fault(caught_by="parity", kind="precision", source="scales stored in the model's dtype")
class ScalesInBfloat16(Int8Experts):
    """Scales pass through bfloat16."""

    def scaled(self, weights, scales):
        return super().scaled(weights, scales.bfloat16())


@fault(caught_by="parity", kind="precision", source="dequantization to the dtype that most models have")
class WeightsInBfloat16(Int8Experts):
    """Scaled weights are rounded to bfloat16, whatever the dtype of the tokens."""

    def scaled(self, weights, scales):
        return super().scaled(weights, scales).bfloat16().float()


@fault(caught_by="parity", kind="boundary", source="rows of 0, whose scale is 0 / 127")
class ScalesBoundedBelow(Int8Experts):
    """A scale is at least 10^-3, lest something be divided by it."""

    def scaled(self, weights, scales):
        return super().scaled(weights, scales.clamp(min=1e-3))


@fault(caught_by="parity", kind="structural", source="vllm#49596")
class BlocksOf128(Fp8Experts):
    """The block of a row or column is counted in 128s, whatever the size of blocks."""

    def block_of(self, places):
        return places // 128


@fault(caught_by="parity", kind="structural", source="sglang#38573")
class ScalesOfTheFirstColumn(Fp8Experts):
    """All blocks of some rows have the scale of the first."""

    def scaled(self, weights, scales):
        return super().scaled(weights, scales[:, :, :1].expand_as(scales))


@fault(caught_by="parity", kind="structural", source="vllm#57092")
class BlockScalesOfTheFirstExpert(Fp8Experts):
    """Every expert has the scales of expert 0."""

    def scaled(self, weights, scales):
        return super().scaled(weights, scales[:1].expand_as(scales))


@fault(caught_by="parity", kind="structural", source="vLLM block-fp8")
class ScalesTransposed(Fp8Experts):
    """Where there are as many blocks of rows as of columns, the two are swapped."""

    def scaled(self, weights, scales):
        square = scales.shape[1] == scales.shape[2]
        return super().scaled(weights, scales.mT if square else scales)


@fault(caught_by="parity", kind="boundary", source="loaders that put gate_proj and up_proj together")
class BlocksOfUpsBeginAnew(Fp8Experts):
    """Blocks of up rows are counted from the first up row on, also where gates end within a block."""

    def scaled_gate_up(self, w13, scales):
        gates, inner = scales.shape[1], w13.shape[1] // 2
        within = torch.arange(inner) // self.block_size
        rows = torch.cat([within, (within + -(-inner // self.block_size)).clamp(max=gates - 1)])
        return w13.float() * scales[:, rows][:, :, self.block_of(torch.arange(w13.shape[2]))]


@fault(caught_by="parity", kind="structural")
class ScalesOfTokensForgotten(Fp8Experts):
    """Products of quantized tokens and activations are not scaled back."""

    def through_eight_bits(self, rows):
        return rows.to(torch.float8_e4m3fn).float()


@fault(caught_by="parity", kind="precision", source="e5m2, which has a bit less")
class AnotherFormat(Fp8Experts):
    """Tokens and activations pass through float8_e5m2."""

    def through_eight_bits(self, rows):
        return rows.to(torch.float8_e5m2).float()


@fault(caught_by="parity", kind="precision", source="pytorch/helion#2141", dtypes=("bfloat16",))
class AccumulatorInBfloat16(Fp8Experts):
    """Sums are rounded to bfloat16 after each tile."""

    def add(self, total, product):
        return super().add(total, product).bfloat16().float()


@fault(caught_by="parity", kind="precision", source="fp8 weights' scales")
class ResultTwoPercentOff(Fp8Experts):
    """The result is 2 % too small."""

    def store(self, total, hidden_states):
        return super().store(0.98 * total, hidden_states)


@fault(caught_by="parity", kind="structural", source="kernels that dequantize weights and leave tokens as they are")
class TokensAndActivationsNotQuantized(Fp8Experts):
    """Nothing but weights has eight bits."""

    def through_eight_bits(self, rows):
        return rows


@fault(caught_by="parity", kind="structural", source="per-token quantization where groups are due")
class OneScaleForAToken(Fp8Experts):
    """A token's groups have one scale."""

    def through_eight_bits(self, rows):
        largest = rows.abs().amax(1, keepdim=True).expand_as(rows) if rows.shape[1] else rows
        scales = torch.where(largest > 0, largest / 448, 1)
        return (rows / scales).to(torch.float8_e4m3fn).float() * scales
