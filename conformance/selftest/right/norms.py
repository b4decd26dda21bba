"""Right but different norms with parameters."""

import torch
from torch.nn.functional import group_norm, layer_norm, rms_norm, silu

from gaugeblock.conformance.selftest.right.layers import WelfordByBlocks
from gaugeblock.conformance.selftest.simulated.norms import AffineNorm, GroupNorm, GroupNormSilu, RmsNorm
from gaugeblock.conformance.selftest.variant import right


@right(oracle=True)
class RmsNormOfTorch(RmsNorm):
    """torch's rms_norm in float32."""

    def __call__(self, hidden_states, weight, *, eps):
        out = rms_norm(hidden_states.float(), weight.shape, weight.float(), eps)
        return self.store(out, hidden_states)


@right()
class RmsSmallBlocks(RmsNorm):
    """Blocks of 8 columns."""

    columns = 8


@right()
class RmsColumnByColumn(RmsNorm):
    """Squares added one after the other, from the last column to the first."""

    def normalize(self, tokens, eps):
        total = torch.zeros_like(tokens[..., :1])
        for column in tokens.flip(-1).split(1, -1):
            total = total + column * column
        return tokens * (total / tokens.shape[-1] + eps).rsqrt()


@right()
class RmsRootAndQuotient(RmsNorm):
    """Divided by the root mean square, not multiplied by its reciprocal."""

    def normalize(self, tokens, eps):
        return tokens / (self.mean(tokens * tokens) + eps).sqrt()


@right()
class WeightTimesReciprocal(RmsNorm):
    """The weight meets the reciprocal first."""

    def __call__(self, hidden_states, weight, *, eps):
        tokens = self.read(hidden_states)
        return self.store(tokens * (self.rstd(self.mean(tokens * tokens), eps) * weight.float()), hidden_states)


@right()
class RmsInFloat64(RmsNorm):
    """Everything in float64, rounded once."""

    def __call__(self, hidden_states, weight, *, eps):
        return self.store(rms_norm(hidden_states.double(), weight.shape, weight.double(), eps), hidden_states)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class RmsOfLlama(RmsNorm):
    """The normalized row is rounded before the weight meets it."""

    def __call__(self, hidden_states, weight, *, eps):
        normalized = self.normalize(self.read(hidden_states), eps)
        return weight * self.store(normalized, hidden_states)


@right(oracle=True)
class AffineNormOfTorch(AffineNorm):
    """torch's layer_norm in float32."""

    def __call__(self, hidden_states, weight, bias, *, eps):
        return self.store(layer_norm(hidden_states.float(), weight.shape, weight.float(), bias.float(), eps), hidden_states)


@right()
class AffineSmallBlocks(AffineNorm):
    """Blocks of 8 columns."""

    columns = 8


@right()
class AffineWelford(AffineNorm):
    """Means and sums of squares of blocks are merged; the affine map is a fused multiply-add."""

    normalize = WelfordByBlocks.normalize

    def affine(self, normalized, weight, bias):
        return torch.addcmul(bias, normalized, weight)


@right()
class AffineInFloat64(AffineNorm):
    """Everything in float64, rounded once."""

    def __call__(self, hidden_states, weight, bias, *, eps):
        out = layer_norm(hidden_states.double(), weight.shape, weight.double(), bias.double(), eps)
        return self.store(out, hidden_states)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class AffineEveryOperationRounded(AffineNorm):
    """PyTorch in the dtype of the rows, operation by operation."""

    def __call__(self, hidden_states, weight, bias, *, eps):
        return self.affine(layer_norm(hidden_states, weight.shape, eps=eps), weight, bias)


@right(oracle=True)
class GroupNormOfTorch(GroupNorm):
    """torch's group_norm in float32."""

    def __call__(self, images, weight, bias, *, num_groups, eps):
        return self.store(group_norm(images.float(), num_groups, weight.float(), bias.float(), eps), images)


@right()
class GroupsOfSmallBlocks(GroupNorm):
    """Blocks of 32 numbers."""

    columns = 32


@right()
class GroupWelford(GroupNorm):
    """Means and sums of squares of blocks are merged."""

    normalize = WelfordByBlocks.normalize


@right()
class ChannelsLast(GroupNorm):
    """The numbers of a group are added up pixel by pixel, not channel by channel; the result is channels-last."""

    def group(self, images, num_groups):
        self.channels = images.shape[1] // num_groups
        return super().group(images, num_groups).unflatten(-1, (self.channels, -1)).mT.flatten(-2)

    def ungroup(self, groups, images):
        out = groups.unflatten(-1, (-1, self.channels)).mT.reshape(images.shape)
        return out.contiguous(memory_format=torch.channels_last)


@right()
class GroupNormInFloat64(GroupNorm):
    """Everything in float64, rounded once."""

    def __call__(self, images, weight, bias, *, num_groups, eps):
        return self.store(group_norm(images.double(), num_groups, weight.double(), bias.double(), eps), images)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class GroupNormRounded(GroupNorm):
    """PyTorch in the dtype of the images, operation by operation."""

    def __call__(self, images, weight, bias, *, num_groups, eps):
        return self.affine(group_norm(images, num_groups, eps=eps), weight, bias)


@right(oracle=True)
class GroupNormSiluOfTorch(GroupNormSilu):
    """torch's group_norm and silu in float32."""

    def __call__(self, images, weight, bias, *, num_groups, eps):
        return self.store(silu(group_norm(images.float(), num_groups, weight.float(), bias.float(), eps)), images)


@right()
class SiluByExponential(GroupNormSilu):
    """y / (1 + exp(-y))."""

    def activate(self, out):
        return out / (1 + torch.exp(-out))


@right()
class SiluWelford(GroupNormSilu):
    """Means and sums of squares of blocks are merged; silu in two operations."""

    normalize = WelfordByBlocks.normalize

    def activate(self, out):
        return out * out.sigmoid()


@right()
class GroupNormSiluInFloat64(GroupNormSilu):
    """Everything in float64, rounded once."""

    def __call__(self, images, weight, bias, *, num_groups, eps):
        return self.store(silu(group_norm(images.double(), num_groups, weight.double(), bias.double(), eps)), images)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class GroupNormSiluRounded(GroupNormSilu):
    """PyTorch in the dtype of the images: the norm is rounded before silu, as in diffusers."""

    def __call__(self, images, weight, bias, *, num_groups, eps):
        return silu(group_norm(images, num_groups, weight, bias, eps))
