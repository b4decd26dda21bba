"""Bugs of adaptive LayerNorms."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.layers import GatedNormModulate, NormModulate


@fault(caught_by="parity", kind="precision", source="apex and xformers fast LayerNorms")
class OnePassVariance(NormModulate):
    """E[x²] − E[x]² loses (mean / deviation)² of the digits."""

    def normalize(self, tokens, eps):
        mean = self.mean(tokens)
        variance = (self.mean(tokens * tokens) - mean * mean).clamp(min=0)
        return (tokens - mean) * self.rstd(variance, eps)


@fault(caught_by="parity", kind="structural", source="torch.var's default")
class UnbiasedVariance(NormModulate):
    """The sum of squares is divided by one less than the width."""

    def variance(self, centred):
        return self.sum(centred * centred) / max(1, centred.shape[-1] - 1)


@fault(caught_by="parity", kind="precision", source="diffusers: 1e-5 in norm2, 1e-6 in norm1 of a DiT block")
class EpsOfAnotherNorm(NormModulate):
    """eps is 1e-5, whatever is asked for."""

    def rstd(self, variance, eps):
        return super().rstd(variance, 1e-5)


@fault(caught_by="parity", kind="precision", source="hand-written LayerNorms of early transformers")
class EpsOutsideTheRoot(NormModulate):
    """eps is added to the deviation."""

    def rstd(self, variance, eps):
        return 1 / (variance.sqrt() + eps)


@fault(caught_by="parity", kind="boundary", source="triton tutorials before `tl.where(cols < N, x - mean, 0.)`")
class PaddingInTheVariance(NormModulate):
    """The lanes that fill the last block hold 0 − mean, and are squared and added."""

    def normalize(self, tokens, eps):
        mean, width = self.mean(tokens), tokens.shape[-1]
        padded = torch.nn.functional.pad(tokens, (0, -width % self.columns)) - mean
        return (tokens - mean) * self.rstd(self.sum(padded * padded) / width, eps)


@fault(caught_by="parity", kind="boundary")
class MeanOverThePaddedWidth(NormModulate):
    """Sums are divided by the number of lanes."""

    def mean(self, values):
        return self.sum(values) / (1 << (values.shape[-1] - 1).bit_length())


@fault(caught_by="parity", kind="boundary", smallest=65)
class SecondBlockOfARowForgotten(NormModulate):
    """The mean is that of the first block of columns."""

    def mean(self, values):
        first = values[..., : self.columns]
        return super().mean(first)


@fault(caught_by="nan_containment", kind="memory")
class RowsPooledOverTheBatch(NormModulate):
    """A block of rows takes its maximum over all examples, to scale squares: 0 · NaN reaches the neighbours."""

    def center(self, tokens, mean):
        return super().center(tokens, mean) + 0 * mean.amax(0, keepdim=True)


@fault(caught_by="parity", kind="structural", source="AdaLayerNormContinuous")
class ShiftAndScaleSwapped(NormModulate):
    """The first of two chunks is taken for the scale."""

    def modulate(self, normalized, shift, scale):
        return super().modulate(normalized, scale, shift)


@fault(caught_by="parity", kind="structural", source="AdaLayerNormContinuous")
class OneForgotten(NormModulate):
    """The normalized token is multiplied by the scale alone."""

    def modulate(self, normalized, shift, scale):
        return super().modulate(normalized, shift, scale - 1)


@fault(caught_by="parity", kind="structural", smallest=4)
class SteeredByTheFirstExample(NormModulate):
    """All examples get the shift and scale of the first."""

    def modulate(self, normalized, shift, scale):
        return super().modulate(normalized, shift[:1], scale[:1])


@fault(caught_by="parity", kind="precision", source="eager ports: `(1 + scale)` in the model's dtype", dtypes=("bfloat16",))
class OnePlusScaleRounded(NormModulate):
    """1 + scale is rounded to bfloat16."""

    def modulate(self, normalized, shift, scale):
        return super().modulate(normalized, shift, (1 + scale).bfloat16().float() - 1)


@fault(caught_by="layout", kind="memory", source="`chunk(6, dim=1)` gives strided views")
class StridesOfChunksIgnored(NormModulate):
    """The scale is addressed as if it were contiguous."""

    def __call__(self, hidden_states, shift, scale, *, eps):
        flat = scale.as_strided(scale.shape, (scale.shape[1], 1)) if scale.numel() else scale
        return super().__call__(hidden_states, shift, flat, eps=eps)


@fault(caught_by="parity", kind="structural")
class ResidualDropped(GatedNormModulate):
    """Only the gated branch goes on."""

    def add(self, residual, branch, gate):
        return super().add(0 * residual, branch, gate)


@fault(caught_by="parity", kind="structural", source="adaLN for adaLN-Zero")
class GateIgnored(GatedNormModulate):
    """The branch is added as it is."""

    def add(self, residual, branch, gate):
        return super().add(residual, branch, 0 * gate + 1)


@fault(caught_by="parity", kind="structural", source="pre-norm and post-norm mixed up")
class NormOfTheResidual(GatedNormModulate):
    """The norm reads the residual, not the sum."""

    def kept(self, hidden_states, residual):
        return residual.float() + 0 * hidden_states


@fault(caught_by="parity", kind="precision", source="residual + norm in two kernels", dtypes=("bfloat16",))
class NormOfTheRoundedSum(GatedNormModulate):
    """The norm reads the sum after it was rounded to bfloat16."""

    def kept(self, hidden_states, residual):
        return hidden_states.bfloat16().float()


@fault(caught_by="inputs_unchanged", kind="memory", source="in-place fused residual")
class ResidualOverwritten(GatedNormModulate):
    """The sum is written over the residual."""

    def store(self, result, tokens):
        out = super().store(result, tokens)
        tokens.detach().copy_(out.detach())
        return out


@fault(caught_by="gradients", kind="gradient")
class GateGradientMissesTheLastToken(GatedNormModulate):
    """The sum over an example's tokens ends one too early."""

    def add(self, residual, branch, gate):
        of_tokens = gate[:, None].expand_as(branch)
        return residual + torch.cat([of_tokens[:, :-1], of_tokens[:, -1:].detach()], 1) * branch


@fault(caught_by="gradients", kind="gradient")
class ShiftGradientOfOneBlock(GatedNormModulate):
    """The gradient of shift is that of an example's first 16 tokens."""

    def modulate(self, normalized, shift, scale):
        blocks = normalized.split(16, 1)
        shifts = [shift] + [shift.detach()] * (len(blocks) - 1)
        parts = zip(blocks, shifts, strict=True)
        return torch.cat([super(ShiftGradientOfOneBlock, self).modulate(block, each, scale) for block, each in parts], 1)


@fault(caught_by="gradients", kind="gradient", source="fused backward kernels that forget the second path")
class GradientOfTheNormAlone(GatedNormModulate):
    """The gradient of the residual stream is that through the norm; what comes from its other use is lost."""

    def store(self, result, tokens):
        self.stored = getattr(self, "stored", 0) + 1
        is_stream = self.stored % 2 == 1
        return super().store(result.detach() + 0 * result if is_stream else result, tokens)


@fault(caught_by="gradients", kind="gradient", source="statistics saved without their graph")
class StatisticsConstant(GatedNormModulate):
    """Backward takes mean and deviation for constants."""

    def mean(self, values):
        return super().mean(values).detach()
