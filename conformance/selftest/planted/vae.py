"""Bugs of ports of AutoencoderKL."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.vae import Decoder, Encoder


@fault(caught_by="parity", kind="boundary", source="VAE ports: padding=1 in the strided convolution")
class HalvedWithZerosOnAllSides(Encoder):
    """The convolution that halves has zeros before the first row and column."""

    def halve(self, state, name, images):
        return functional.conv2d(images, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1)[
            :, :, : images.shape[2] // 2, : images.shape[3] // 2
        ]


@fault(caught_by="parity", kind="boundary", source="TensorFlow ports: SAME padding depends on the size")
class OddSizesPaddedBefore(Encoder):
    """An odd size is padded on both sides, an even one after the last."""

    def pad(self, images, rest, stride):
        if stride == 1:
            return super().pad(images, rest, stride)
        rows, columns = (size % 2 for size in images.shape[2:])
        return functional.pad(images, (columns, 1 - columns, rows, 1 - rows))


@fault(caught_by="parity", kind="structural", source="ports that pad with the edge, as tiled decoders do")
class EdgesRepeated(Decoder):
    """An image goes on beyond its edge as it ended."""

    def pad(self, images, rest, stride):
        return functional.pad(images, (rest,) * 4, mode="replicate")


@fault(caught_by="parity", kind="precision", source="GroupNorm and LayerNorm eps 1e-5 / 1e-6 mixed up")
class EpsOfTorch(Encoder):
    """Every GroupNorm has torch's default."""

    def eps(self, name):
        return 1e-5


@fault(caught_by="parity", kind="precision", source="ports that set the eps of residual blocks alone")
class EpsOfTheLastNorm(Decoder):
    """The last GroupNorm has torch's default."""

    def eps(self, name):
        return 1e-5 if "conv_norm_out" in name else super().eps(name)


@fault(caught_by="parity", kind="structural", source="unbiased variances: torch.var by default")
class VarianceUnbiased(Encoder):
    """Squares are divided by one less than their number."""

    def variance(self, centred, axes):
        count = centred[0, 0].numel()
        return super().variance(centred, axes) * (count / max(count - 1, 1))


@fault(caught_by="parity", kind="precision", source="one-pass kernels: E[x²] - E[x]²")
class VarianceInOnePass(Decoder):
    """The variance is the mean of squares less the square of the mean, in float32."""

    def norm(self, state, name, images, num_groups):
        groups = images.unflatten(1, (num_groups, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = (groups.square().mean((2, 3, 4), keepdim=True) - mean.square()).clamp(min=0)
        normalized = ((groups - mean) * (variance + self.eps(name)).rsqrt()).flatten(1, 2)
        return normalized * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


@fault(caught_by="parity", kind="structural", source="ports of GroupNorm to channels-last layouts")
class ChannelsDealtToGroups(Decoder):
    """Channel c is of group c modulo their number."""

    def norm(self, state, name, images, num_groups):
        def dealt(tensor, axis, groups):
            return tensor.unflatten(axis, (groups, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)

        channels_per_group = images.shape[1] // num_groups
        own = {f"{name}.{each}": dealt(state[f"{name}.{each}"], 0, channels_per_group) for each in ("weight", "bias")}
        normalized = super().norm(own, name, dealt(images, 1, channels_per_group), num_groups)
        return dealt(normalized, 1, num_groups)


@fault(caught_by="parity", kind="structural", source="LayerNorm for GroupNorm")
class EachPlaceByItself(Encoder):
    """Statistics are those of a group's channels at one place."""

    def axes_of_a_group(self):
        return (2,)


@fault(caught_by="parity", kind="structural", source="ports of GroupNorm + silu as two modules, one of them lost")
class NoSiluBeforeTheLastConvolution(Decoder):
    """The last convolution sees what is normalized."""

    def norm_silu(self, state, name, images, num_groups):
        if "conv_norm_out" in name:
            return self.norm(state, name, images, num_groups)
        return super().norm_silu(state, name, images, num_groups)


@fault(caught_by="parity", kind="structural", source="attention processors with residual_connection=False")
class AttentionWithoutItsResidual(Decoder):
    """What attention gives takes the place of what it saw."""

    def residual(self, images):
        return torch.zeros_like(images)


@fault(caught_by="parity", kind="structural", source="heads of 8 or 64 channels by default")
class TwoHeads(Encoder):
    """Attention has two heads where the channels can be halved."""

    def attended(self, query, key, value):
        if query.shape[-1] % 2:
            return super().attended(query, key, value)
        halves = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in (query, key, value))
        return super().attended(*halves).transpose(1, 2).flatten(2)


@fault(caught_by="parity", kind="structural", source="the old AttentionBlock: scale twice by the fourth root")
class ScaledByTheFourthRoot(Decoder):
    """Scores are divided by the fourth root of the channels."""

    def root(self, channels):
        return super().root(channels) ** 0.5


@fault(caught_by="parity", kind="structural", source="NHWC ports")
class PlacesByColumns(Encoder):
    """Tokens are taken column by column, and put back row by row."""

    def tokens(self, images):
        return super().tokens(images.mT)


@fault(caught_by="parity", kind="structural", source="half of the log variance given as if it were the whole")
class LogOfTheDeviation(Encoder):
    """The second half is taken for the log of the deviation."""

    def clamp(self, logvar):
        return super().clamp(2 * logvar)


@fault(caught_by="parity", kind="structural", source="moments split where the deviation comes first")
class VarianceFirst(Encoder):
    """The halves are exchanged."""

    def halves(self, moments):
        mean, logvar = super().halves(moments)
        return logvar, mean


@fault(caught_by="parity", kind="boundary", source="DiagonalGaussianDistribution without its clamp")
class LogVarianceNotClamped(Encoder):
    """The log variance is as the network gives it."""

    def clamp(self, logvar):
        return logvar


@fault(caught_by="parity", kind="boundary", source="clamps to [-20, 20] and [-30, 30]")
class LogVarianceClampedEvenly(Encoder):
    """The log variance is clamped to [-20, 20]."""

    def clamp(self, logvar):
        return logvar.clamp(-20, 20)


@fault(caught_by="parity", kind="structural", source="upsampling as in image libraries: bilinear")
class DoubledSmoothly(Decoder):
    """The image is doubled by bilinear interpolation."""

    def double(self, images):
        return functional.interpolate(images, scale_factor=2.0, mode="bilinear")


@fault(caught_by="parity", kind="structural", source="layers_per_block + 1 forgotten")
class OneBlockLess(Decoder):
    """The decoder has as many residual blocks as the encoder."""

    def layers(self, config):
        return config.layers_per_block


@fault(caught_by="parity", kind="structural", source="shift and scale applied by the model and the pipeline: SDXL, Flux")
class LatentsUnscaledAgain(Decoder):
    """The decoder undoes a scaling that its caller has undone."""

    def image(self, state, latents, config):
        return super().image(state, latents / config.scaling_factor + config.shift_factor, config)


@fault(caught_by="parity", kind="boundary", source="pipelines' postprocessing inside of the model")
class ImagesClamped(Decoder):
    """Pixels are clamped to [-1, 1]."""

    def store(self, images):
        return images.clamp(-1, 1)


@fault(caught_by="nan_containment", kind="structural", source="GroupNorm over a batch reshaped into one image")
class StatisticsOfTheBatch(Encoder):
    """Means and variances are those of all images."""

    def axes_of_a_group(self):
        return 0, 2, 3, 4


@fault(caught_by="inputs_unchanged", kind="memory", source="in-place normalization of images to [-1, 1]")
class ImagesClampedInPlace(Encoder):
    """Images are clamped where they lie."""

    def load(self, inputs):
        inputs.detach().clamp_(-1, 1)
        return super().load(inputs)


@fault(caught_by="gradients", kind="gradient", source="a frozen decoder's latents detached")
class ShortcutsDetached(Decoder):
    """Gradients go through the branches alone where the channels stay."""

    def shortcut(self, state, name, images):
        stays = f"{name}.conv_shortcut.weight" not in state
        return images.detach() if stays else super().shortcut(state, name, images)


@fault(caught_by="gradients", kind="gradient", source="straight-through estimators around a clamp")
class ClampPassesGradients(Encoder):
    """The clamp's gradient is 1 everywhere."""

    def clamp(self, logvar):
        return logvar + (super().clamp(logvar) - logvar).detach()


@fault(caught_by="same_pointer_new_data", kind="state", source="latents cached by the address of an image")
class MomentsKept(Encoder):
    """The moments of images of one size are computed once."""

    def __init__(self):
        self.cache = {}

    def moments(self, state, images, config):
        fresh = super().moments(state, images, config)
        return self.cache.setdefault(fresh.shape, fresh.detach()) + (fresh - fresh.detach())
