"""Bugs of norms with parameters."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.norms import AffineNorm, GroupNorm, GroupNormSilu, RmsNorm


@fault(caught_by="parity", kind="precision", source="T5LayerNorm before float32 variances", dtypes=("float16",))
class SquaresInHalfPrecision(RmsNorm):
    """Squares are float16, which ends at 65504."""

    def variance(self, centred):
        return self.mean((centred * centred).half().float())


@fault(caught_by="parity", kind="precision", source="1e-6 of Llama 1 for 1e-5 of Llama 2")
class EpsOfAnotherModel(RmsNorm):
    """eps is 1e-6, whatever is asked for."""

    def rstd(self, variance, eps):
        return super().rstd(variance, 1e-6)


@fault(caught_by="parity", kind="precision", source="the paper's own code, rms = norm * d ** -0.5, x / (rms + eps)")
class EpsBesideTheRoot(RmsNorm):
    """eps is added to the root mean square."""

    def rstd(self, variance, eps):
        return 1 / (variance.sqrt() + eps)


@fault(caught_by="parity", kind="structural", source="LayerNorm for RMSNorm")
class MeanSubtracted(RmsNorm):
    """Rows lose their mean."""

    def read(self, tokens):
        return super().read(tokens) - self.mean(super().read(tokens))


@fault(caught_by="parity", kind="structural", source="Gemma's RMSNorm, whose weight counts from 1 on")
class WeightFromOneOn(RmsNorm):
    """Rows are multiplied by 1 + weight."""

    def scale(self, normalized, weight):
        return super().scale(normalized, 1 + weight)


@fault(caught_by="parity", kind="structural", source="QK norms over all heads for norms of each head")
class HeadsNormalizedTogether(RmsNorm):
    """One root mean square for all rows of an example."""

    def variance(self, centred):
        return super().variance(centred).mean(-2, keepdim=True).expand(*centred.shape[:-1], 1)


class _InPlace(torch.autograd.Function):
    """Nothing, but that the gradient is overwritten once it was read."""

    @staticmethod
    def forward(ctx, out):
        return out.clone()

    @staticmethod
    def backward(ctx, gradient):
        read = gradient.clone()
        gradient.mul_(0.5)
        return read


@fault(caught_by="inputs_unchanged", kind="memory", source="Liger's RMSNorm with in_place, its default")
class GradientWrittenOverTheGiven(RmsNorm):
    """Backward writes over the gradient of its result: of r + norm(x), r gets what x gets."""

    def store(self, out, tokens):
        return _InPlace.apply(super().store(out, tokens))


@fault(caught_by="parity", kind="boundary")
class DividedByThePaddedWidth(RmsNorm):
    """The sum of squares is divided by the number of lanes."""

    def mean(self, values):
        return self.sum(values) / (1 << (values.shape[-1] - 1).bit_length())


@fault(caught_by="parity", kind="boundary", smallest=65)
class FirstBlockAlone(RmsNorm):
    """A row's root mean square is that of its first block of columns."""

    def mean(self, values):
        return super().mean(values[..., : self.columns])


@fault(caught_by="parity", kind="precision", source="LlamaRMSNorm casts before its weight", dtypes=("bfloat16",))
class RoundedBeforeTheWeight(RmsNorm):
    """The normalized row is rounded to bfloat16, then scaled and rounded again."""

    def scale(self, normalized, weight):
        return super().scale(normalized.bfloat16().float(), weight)


@fault(caught_by="gradients", kind="gradient", source="statistics saved without their graph")
class RootMeanSquareConstant(RmsNorm):
    """Backward takes the root mean square for a constant."""

    def variance(self, centred):
        return super().variance(centred).detach()


@fault(caught_by="gradients", kind="gradient", source="attorch#18: a last partial block of rows dropped")
class WeightGradientOfWholeBlocks(RmsNorm):
    """The gradient of the weight is that of whole blocks of 16 rows."""

    def scale(self, normalized, weight):
        rows = normalized.shape[:-1].numel()
        counted = (torch.arange(rows) < max(1, rows // 16 * 16)).view(*normalized.shape[:-1], 1)
        return torch.where(counted, super().scale(normalized, weight), super().scale(normalized, weight.detach()))


@fault(caught_by="gradients", kind="gradient", source="weight gradients of tokens averaged as if of batches")
class WeightGradientOfOneExample(RmsNorm):
    """The gradient of the weight is the mean over examples, not the sum."""

    def scale(self, normalized, weight):
        examples = max(1, normalized.shape[0])
        return super().scale(normalized, weight.detach() + (weight - weight.detach()) / examples)


@fault(caught_by="layout", kind="memory", source="Liger-Kernel#1375: rows are flattened after their stride was read")
class RowStrideIgnored(RmsNorm):
    """Rows are taken to lie one behind the other."""

    def read(self, tokens):
        packed = (*tokens.shape[1:], 1)
        strides = [torch.Size(packed[place:]).numel() for place in range(tokens.ndim)]
        return super().read(tokens.as_strided(tokens.shape, strides) if tokens.numel() else tokens)


@fault(caught_by="parity", kind="precision", source="apex and xformers fast LayerNorms")
class AffineOnePassVariance(AffineNorm):
    """E[x²] − E[x]² loses (mean / deviation)² of the digits."""

    def normalize(self, tokens, eps):
        mean = self.mean(tokens)
        variance = (self.mean(tokens * tokens) - mean * mean).clamp(min=0)
        return (tokens - mean) * self.rstd(variance, eps)


@fault(caught_by="parity", kind="structural", source="torch.var's default")
class AffineUnbiasedVariance(AffineNorm):
    """The sum of squares is divided by one less than the width."""

    def variance(self, centred):
        return self.sum(centred * centred) / max(1, centred.shape[-1] - 1)


@fault(caught_by="parity", kind="structural")
class BiasScaled(AffineNorm):
    """The bias is added before the weight multiplies."""

    def affine(self, normalized, weight, bias):
        return (normalized + bias) * weight


@fault(caught_by="gradients", kind="gradient", source="fused backward kernels that reuse one buffer")
class BiasGradientOfTheRow(AffineNorm):
    """The bias gets the gradient of the normalized rows."""

    def affine(self, normalized, weight, bias):
        return super().affine(normalized + bias - bias.detach(), weight, bias.detach())


@fault(caught_by="parity", kind="precision", source="GroupNorm kernels that keep a sum and a sum of squares")
class GroupOnePassVariance(GroupNorm):
    """E[x²] − E[x]² loses (mean / deviation)² of the digits."""

    normalize = AffineOnePassVariance.normalize


@fault(caught_by="parity", kind="precision", source="1e-6 of the VAE for 1e-5 of the UNet's residual blocks")
class EpsOfTheVae(GroupNorm):
    """eps is 1e-6, whatever is asked for."""

    def rstd(self, variance, eps):
        return super().rstd(variance, 1e-6)


@fault(caught_by="parity", kind="structural", source="torch.var's default")
class GroupUnbiasedVariance(GroupNorm):
    """The sum of squares is divided by one less than the size of the group."""

    variance = AffineUnbiasedVariance.variance


@fault(caught_by="parity", kind="structural", source="channels-last ports that reshape [..., C / G, G]")
class ChannelsDealtOut(GroupNorm):
    """Channels c, c + G, c + 2 G, … are a group."""

    def group(self, images, num_groups):
        self.groups = num_groups
        dealt = images.unflatten(1, (-1, num_groups)).transpose(1, 2).reshape(images.shape)
        return super().group(dealt, num_groups)

    def ungroup(self, groups, images):
        return super().ungroup(groups, images).unflatten(1, (self.groups, -1)).transpose(1, 2).reshape(images.shape)


@fault(caught_by="parity", kind="structural", source="InstanceNorm for GroupNorm")
class ChannelsAlone(GroupNorm):
    """Each channel is normalized by itself."""

    def group(self, images, num_groups):
        return super().group(images, images.shape[1])


@fault(caught_by="parity", kind="structural", source="LayerNorm of the channels of a pixel")
class OneGroup(GroupNorm):
    """All channels are one group."""

    def group(self, images, num_groups):
        return super().group(images, 1)


@fault(caught_by="parity", kind="structural")
class WeightsOfTheFirstGroup(GroupNorm):
    """The weight is addressed by the channel's place in its group."""

    def group(self, images, num_groups):
        self.size = images.shape[1] // num_groups
        return super().group(images, num_groups)

    def affine(self, normalized, weight, bias):
        return super().affine(normalized, weight[: self.size].repeat(weight.shape[0] // self.size), bias)


@fault(caught_by="parity", kind="boundary")
class LanesCounted(GroupNorm):
    """A group's sums are divided by its lanes, padded to a power of two."""

    mean = DividedByThePaddedWidth.mean


@fault(caught_by="parity", kind="boundary", smallest=8193)
class PartsOfOneSize(GroupNorm):
    """Means of parts of a large group are averaged, though the last part is smaller."""

    def mean(self, values):
        parts = [self.sum(part) / part.shape[-1] for part in values.split(8192, -1)]
        return sum(parts[1:], parts[0]) / len(parts)


@fault(caught_by="batch_invariance", kind="structural", source="BatchNorm for GroupNorm")
class StatisticsOfTheBatch(GroupNorm):
    """Variances are averaged over the examples."""

    def variance(self, centred):
        return super().variance(centred).mean(0, keepdim=True)


@fault(caught_by="nan_containment", kind="memory")
class GroupsShifted(GroupNorm):
    """A shift against cancellation is taken from all examples: 0 · NaN reaches the others."""

    def center(self, tokens, mean):
        return super().center(tokens, mean) + 0 * mean.amax((0, 1), keepdim=True)


@fault(caught_by="gradients", kind="gradient", source="affine parameters' gradients summed by a kernel for one image")
class BiasGradientOfTheFirstExample(GroupNorm):
    """The gradient of the bias is that of the first example."""

    def affine(self, normalized, weight, bias):
        first, rest = normalized[:1], normalized[1:]
        return torch.cat([super().affine(first, weight, bias), super().affine(rest, weight, bias.detach())])


@fault(caught_by="gradients", kind="gradient", source="statistics saved without their graph")
class GroupStatisticsConstant(GroupNorm):
    """Backward takes mean and deviation for constants."""

    def mean(self, values):
        return super().mean(values).detach()


@fault(caught_by="layout", kind="memory", source="kernels for NCHW that are given channels-last images")
class ChannelStrideTaken(GroupNorm):
    """Pixels are taken to lie side by side, and channels one behind the other."""

    def __call__(self, images, weight, bias, *, num_groups, eps):
        packed = (*images.shape[1:], 1)
        strides = [torch.Size(packed[place:]).numel() for place in range(4)]
        flat = images.as_strided(images.shape, strides) if images.numel() else images
        return super().__call__(flat, weight, bias, num_groups=num_groups, eps=eps)


@fault(caught_by="parity", kind="structural")
class SiluForgotten(GroupNormSilu):
    """The norm is returned as it is."""

    def activate(self, out):
        return out


@fault(caught_by="parity", kind="structural", source="UNets with act_fn of another name")
class GeluForSilu(GroupNormSilu):
    """gelu follows, which looks like silu."""

    def activate(self, out):
        return torch.nn.functional.gelu(out)


@fault(caught_by="parity", kind="structural")
class SiluBeforeTheAffineMap(GroupNormSilu):
    """silu is applied to the normalized images, which are then scaled and shifted."""

    def affine(self, normalized, weight, bias):
        return super().affine(torch.nn.functional.silu(normalized), weight, bias)

    def activate(self, out):
        return out


@fault(caught_by="parity", kind="precision", source="norm and silu in two kernels", dtypes=("bfloat16",))
class SiluOfTheRoundedNorm(GroupNormSilu):
    """The norm is rounded to bfloat16, and silu reads that."""

    def activate(self, out):
        return super().activate(out.bfloat16().float())


@fault(caught_by="gradients", kind="gradient", source="silu's derivative without its second term")
class SlopeOfTheGate(GroupNormSilu):
    """The derivative of silu is taken for sigmoid."""

    def activate(self, out):
        return out * out.sigmoid().detach()
