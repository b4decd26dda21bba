"""Bugs of ports of the UNets."""

import math

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.unet import Unet, UnetTextTime

BFLOAT = ("bfloat16",)


@fault(caught_by="parity", kind="structural", source="diffusers ports: flip_sin_to_cos")
class UnetSinesFirst(Unet):
    """Sines of times come before the cosines."""

    def times(self, timesteps, config):
        return super().times(timesteps, config).roll(config.block_out_channels[0] // 2, -1)


@fault(caught_by="parity", kind="structural", source="diffusers ports: freq_shift 1, as DDPM has it")
class UnetFrequencyShiftOfOne(Unet):
    """The lowest frequency is 1 / 10000."""

    def waves(self, values, width):
        half = width // 2
        angles = values.double()[..., None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
        return torch.cat([angles.cos(), angles.sin()], -1).float()


@fault(caught_by="parity", kind="precision", source="timesteps cast to the model's dtype", dtypes=BFLOAT)
class UnetTimesInBfloat16(Unet):
    """Times 998 and 999 are one."""

    def times(self, timesteps, config):
        return super().times(timesteps.bfloat16(), config)


@fault(caught_by="parity", kind="structural", source="ports that leave out the silu before time_emb_proj")
class UnetSiluForgotten(Unet):
    """ResNet blocks read the time as it was embedded."""

    def steer(self, time):
        return time


@fault(caught_by="parity", kind="precision", source="GroupNorm eps 1e-5 in ResNet blocks, 1e-6 in transformers")
class OneEpsForTransformersToo(Unet):
    """The GroupNorm before a transformer has the eps of the ResNet blocks."""

    def transformer_eps(self, config):
        return config.norm_eps


@fault(caught_by="parity", kind="precision", source="GroupNorm eps of the autoencoder, 1e-6, for the UNet")
class UnetEpsOfTheAutoencoder(Unet):
    """Every GroupNorm has 1e-6."""

    def norm(self, state, name, images, num_groups, eps):
        return super().norm(state, name, images, num_groups, 1e-6)


@fault(caught_by="parity", kind="structural", source="ports of GroupNorm to channels-last layouts")
class UnetChannelsDealtToGroups(Unet):
    """Channel c is of group c modulo their number."""

    def groups(self, images, num_groups):
        return images.unflatten(1, (-1, num_groups)).transpose(1, 2).contiguous()

    def ungroup(self, groups):
        return groups.transpose(1, 2).flatten(1, 2)


@fault(caught_by="parity", kind="structural", source="GEGLU ports: which half is the gate")
class UnetGateFirst(Unet):
    """The first half of the product is the gate, as in SwiGLU checkpoints."""

    def gated(self, first, second):
        return super().gated(second, first)


@fault(caught_by="parity", kind="precision", source="JAX ports: jax.nn.gelu is the approximation by default")
class UnetGeluByTanh(Unet):
    """The GELU is the approximation by tanh, a thousandth away."""

    def gelu(self, gate):
        return functional.gelu(gate, approximate="tanh")


@fault(caught_by="parity", kind="structural", source="diffusers#2011: attention_head_dim is the number of heads")
class HeadsOfThatWidth(Unet):
    """attention_head_dim is taken for what it is called."""

    def heads(self, level, config):
        return config.block_out_channels[level] // config.attention_head_dim[level]


@fault(caught_by="parity", kind="structural")
class UnetScaledByTheWholeWidth(Unet):
    """Scores are divided by the root of all channels."""

    def attended(self, query, key, value, mask):
        return super().attended(query / math.sqrt(query.shape[1]), key, value, mask)


@fault(caught_by="parity", kind="structural", source="ports: order of torch.cat in the way up")
class SkipsBeforeImages(Unet):
    """What was kept comes before what comes from below."""

    def join(self, images, skip):
        return torch.cat([skip, images], 1)


@fault(caught_by="parity", kind="structural", source="ports: pop(0) for pop()")
class FirstKeptFirst(Unet):
    """What a level kept is taken in the order of the way down, where its sizes do not tell."""

    def order(self, skips):
        return skips[::-1] if len({each.shape for each in skips}) == 1 else skips


@fault(caught_by="parity", kind="boundary", source="diffusers: upsample_size is forwarded for odd sizes alone")
class FirstRowCutOff(Unet):
    """Of an odd size the first row and column of what was doubled are left out."""

    def double(self, images, extents):
        return functional.interpolate(images, scale_factor=2.0)[:, :, -extents[0] :, -extents[1] :]


@fault(caught_by="parity", kind="boundary", source="downsample_padding 0 with asymmetric zeros, as in the autoencoder")
class HalvedLikeTheAutoencoder(Unet):
    """The convolution that halves has zeros after the last row and column alone."""

    def halve(self, state, name, images):
        rows, columns = (1 + size % 2 for size in images.shape[2:])
        padded = functional.pad(images, (0, columns, 0, rows))
        return functional.conv2d(padded, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)


@fault(caught_by="parity", kind="structural", source="ports: reshape for permute before proj_in")
class PixelsNotTransposed(Unet):
    """Channels of an image are read as if they came pixel by pixel."""

    def tokens(self, images):
        return images.reshape(images.shape[0], images[0, 0].numel(), images.shape[1])


@fault(caught_by="parity", kind="structural", source="pipelines that accept encoder_attention_mask and drop it")
class TextMaskIgnored(Unet):
    """All words are looked at."""

    def attended(self, query, key, value, mask):
        return super().attended(query, key, value, None)


@fault(caught_by="parity", kind="structural", source="boolean masks added to scores as numbers")
class TextMaskAdded(Unet):
    """The mask is added to the scores: 1 where there is text, 0 where there is none."""

    def hide(self, scores, hidden):
        return scores + (~hidden).to(scores.dtype)


@fault(caught_by="parity", kind="boundary", source="diffusers: a bias of -10000 for each score of a row is none")
class NoTextIsAllText(Unet):
    """An example without any text looks at all of it."""

    def nothing(self, hidden):
        return torch.zeros_like(hidden)


@fault(caught_by="parity", kind="boundary", source="softmax over a row of minus infinities")
class NoTextIsNan(Unet):
    """An example without any text is NaN."""

    def hide(self, scores, hidden):
        return scores.masked_fill(hidden, -math.inf)

    def nothing(self, hidden):
        return torch.zeros_like(hidden)


@fault(caught_by="nan_containment", kind="structural", source="pixels flattened over the batch without a mask")
class UnetAttendsAcrossTheBatch(Unet):
    """The pixels of all examples are one sequence."""

    def attention(self, state, name, tokens, asked, mask, heads):
        if "attn2" in name:
            return super().attention(state, name, tokens, asked, mask, heads)
        together = tokens.flatten(0, 1)[None]
        return super().attention(state, name, together, together, None, heads).view(tokens.shape)


@fault(caught_by="same_pointer_new_data", kind="state", source="caches of the embedding of a step, kept by shape")
class UnetTimeKept(Unet):
    """What steers a batch of one size is computed once."""

    def __init__(self):
        self.cache = {}

    def steer(self, time):
        fresh = super().steer(time)
        return self.cache.setdefault(fresh.shape, fresh.detach()) + (fresh - fresh.detach())


@fault(caught_by="inputs_unchanged", kind="memory", source="in-place scaling of latents")
class UnetInputsScaledInPlace(Unet):
    """Latents and text are clamped where they lie."""

    def load(self, inputs):
        inputs.detach().clamp_(-1, 1)
        return super().load(inputs)


@fault(caught_by="gradients", kind="gradient", source="text encoders that are to be trained, behind a detach")
class TextFrozen(Unet):
    """The text gets no gradient."""

    def block(self, state, name, tokens, text, heads):
        return super().block(state, name, tokens, (text[0].detach(), text[1]), heads)


@fault(caught_by="gradients", kind="gradient", source="checkpointed skips that are detached")
class SkipsDetached(Unet):
    """What is kept on the way down gets no gradient on the way up."""

    def join(self, images, skip):
        return super().join(images, skip.detach())


@fault(caught_by="parity", kind="structural", source="SDXL ports: torch.cat of time_ids and text_embeds")
class SizesBeforeText(UnetTextTime):
    """The waves come before the pooled text."""

    def together(self, text, waves):
        return torch.cat([waves, text], 1)


@fault(caught_by="parity", kind="structural", source="SDXL ports: embeddings stacked and flattened along the wrong axis")
class WavesInterleaved(UnetTextTime):
    """Waves of all numbers come frequency by frequency."""

    def numbers(self, time_ids, width):
        return super().numbers(time_ids, width).transpose(1, 2)


@fault(caught_by="parity", kind="structural", source="SDXL pipelines: (width, height) for (height, width)")
class WidthsBeforeHeights(UnetTextTime):
    """Numbers are taken from the last on."""

    def numbers(self, time_ids, width):
        return super().numbers(time_ids.flip(1), width)


@fault(caught_by="parity", kind="precision", source="diffusers: time_ids made in the dtype of the text", dtypes=BFLOAT)
class SizesInBfloat16(UnetTextTime):
    """Sizes 1024 and 1023 are one."""

    def numbers(self, time_ids, width):
        return super().numbers(time_ids.bfloat16(), width)


@fault(caught_by="gradients", kind="gradient", source="SDXL fine-tuning: the pooled text computed under no_grad")
class PooledTextFrozen(UnetTextTime):
    """The pooled text gets no gradient."""

    def together(self, text, waves):
        return super().together(text.detach(), waves)
