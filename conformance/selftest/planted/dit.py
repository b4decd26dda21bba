"""Bugs of DiT ports."""

import math

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.dit import Dit

BFLOAT = ("bfloat16",)


@fault(caught_by="parity", kind="structural", source="diffusers ports: flip_sin_to_cos")
class SinesFirst(Dit):
    """Sines of times come before the cosines."""

    def times(self, timesteps, config):
        return super().times(timesteps, config).roll(config.frequency_embedding_size // 2, -1)


@fault(caught_by="parity", kind="structural", source="diffusers ports: downscale_freq_shift")
class FrequencyShiftIgnored(Dit):
    """Frequencies are those of the paper's code, whatever is asked for."""

    def waves(self, values, width, shift):
        return super().waves(values, width, 0)


@fault(caught_by="parity", kind="precision", source="diffusers and Flux ports", dtypes=BFLOAT)
class TimesInBfloat16(Dit):
    """Times 998 and 999 are one."""

    def times(self, timesteps, config):
        return super().times(timesteps.bfloat16().float(), config)


@fault(caught_by="parity", kind="precision", source="frequencies in the model's dtype", dtypes=BFLOAT)
class FrequenciesInBfloat16(Dit):
    """The frequencies are rounded to bfloat16, and the angles are up to 1000 times as wrong."""

    def times(self, timesteps, config):
        half = config.frequency_embedding_size // 2
        exponents = -torch.arange(half, dtype=torch.float64) / (half - config.frequency_shift)
        angles = timesteps[:, None] * (10000**exponents).bfloat16().float()
        return torch.cat([angles.cos(), angles.sin()], 1)


@fault(caught_by="parity", kind="structural", source="samplers that tell a model t in [0, 1]")
class TimesDividedByAThousand(Dit):
    """The factor 1000 is applied by the sampler and taken back here."""

    def times(self, timesteps, config):
        return super().times(timesteps / 1000, config)


@fault(caught_by="parity", kind="boundary", source="ports without the row of the dropped label")
class DroppedLabelIsTheFirstRow(Dit):
    """The label that was dropped is taken modulo the number of classes."""

    def classes(self, state, labels, config):
        return super().classes(state, labels % config.num_classes, config)


@fault(caught_by="parity", kind="structural")
class SiluForgotten(Dit):
    """The modulations see the conditioning itself."""

    def conditions(self, state, timesteps, labels, config):
        inner = torch.nn.functional.silu(self.linear(state, "t_embedder.mlp.0", self.times(timesteps, config)))
        return self.linear(state, "t_embedder.mlp.2", inner) + self.classes(state, labels, config)


@fault(caught_by="same_pointer_new_data", kind="state", source="TeaCache and its kin")
class ConditioningKept(Dit):
    """The conditioning of a batch of one size is computed once."""

    def __init__(self):
        self.cache = {}

    def conditions(self, state, timesteps, labels, config):
        fresh = super().conditions(state, timesteps, labels, config)
        return self.cache.setdefault(fresh.shape, fresh.detach()) + (fresh - fresh.detach())


@fault(caught_by="parity", kind="structural", source="Flux ports: axes swapped")
class RowsBeforeColumns(Dit):
    """The position table has the row first."""

    def join_axes(self, column, row):
        return super().join_axes(row, column)


@fault(caught_by="parity", kind="structural")
class CosinesOfPlacesFirst(Dit):
    """The position table is made as the times' embedding is."""

    def join_axes(self, column, row):
        half = column.shape[1] // 2
        return super().join_axes(column.roll(half, 1), row.roll(half, 1))


@fault(caught_by="parity", kind="structural", source="einops ports: `(p1 p2 c)` for a convolution's kernel")
class ChannelLastInPatches(Dit):
    """Values of a patch are taken row, column, channel; the kernel has the channel first."""

    def patchify(self, latents, patch):
        return super().patchify(latents, patch).unflatten(-1, (latents.shape[1], -1)).transpose(2, 3).flatten(2)


@fault(caught_by="parity", kind="structural", source="unpatchify as the inverse of patchify")
class ChannelFirstInTheResult(Dit):
    """The last layer's values are taken channel, row, column."""

    def unpatchify(self, patches, config):
        moved = patches.unflatten(-1, (config.out_channels, -1)).transpose(2, 3).flatten(2)
        return super().unpatchify(moved, config)


@fault(caught_by="parity", kind="structural")
class ImageTransposed(Dit):
    """Patches are put together column by column."""

    def unpatchify(self, patches, config):
        grid = config.input_size // config.patch_size
        return super().unpatchify(patches.unflatten(1, (grid, grid)).transpose(1, 2).flatten(1, 2), config)


@fault(caught_by="parity", kind="structural", source="learn_sigma in samplers that chunk the channels")
class SigmaFirst(Dit):
    """The channels of the variance come before those of the noise."""

    def unpatchify(self, patches, config):
        out = super().unpatchify(patches, config)
        return out.roll(config.in_channels, 1) if config.learn_sigma else out


@fault(caught_by="parity", kind="structural", source="AdaLayerNormContinuous: scale, shift")
class ScaleBeforeShift(Dit):
    """The final layer's first half is taken for the scale."""

    def halves(self, *parts):
        return parts[::-1]


@fault(caught_by="parity", kind="structural", source="chunk order of AdaLayerNormZero")
class GatesBetweenTheShifts(Dit):
    """The six parts are taken as shifts, scales, gates."""

    def sixths(self, *parts):
        return tuple(parts[each] for each in (0, 2, 4, 1, 3, 5))


@fault(caught_by="parity", kind="structural", source="adaLN ports")
class OneForgotten(Dit):
    """Normalized tokens are multiplied by the scale alone."""

    def modulate(self, normalized, shift, scale):
        return normalized * scale + shift


@fault(caught_by="parity", kind="precision", source="diffusers: norm_eps is that of norm2 alone")
class OneEpsForAllNorms(Dit):
    """The first LayerNorm has the second one's eps."""

    def block(self, state, tokens, conditioning, config):
        self.eps = config.norm_eps
        return super().block(state, tokens, conditioning, config)

    def norm(self, tokens, eps):
        return super().norm(tokens, self.eps)


@fault(caught_by="parity", kind="precision", source="GroupNorm and LayerNorm eps 1e-5 / 1e-6 mixed up")
class NormEpsIgnored(Dit):
    """Every LayerNorm has 1e-6."""

    def norm(self, tokens, eps):
        return super().norm(tokens, 1e-6)


@fault(caught_by="parity", kind="precision", source="DiT and CLIP ports")
class ExactGelu(Dit):
    """The GELU is the exact one, a thousandth away."""

    def gelu(self, inner):
        return torch.nn.functional.gelu(inner)


@fault(caught_by="parity", kind="structural", source="Megatron's fused qkv")
class QkvOfEachHeadTogether(Dit):
    """Rows of the fused product are read as heads of queries, keys and values."""

    def heads(self, qkv, num_heads):
        return qkv.unflatten(-1, (num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind()


@fault(caught_by="parity", kind="structural")
class ScaledByTheWholeWidth(Dit):
    """Scores are divided by the root of the hidden size."""

    def root(self, query, num_heads):
        return math.sqrt(num_heads) * super().root(query, num_heads)


@fault(caught_by="nan_containment", kind="structural", source="tokens flattened over the batch without a mask")
class AttendsAcrossTheBatch(Dit):
    """The tokens of all examples are one sequence."""

    def attention(self, state, tokens, num_heads):
        return super().attention(state, tokens.flatten(0, 1)[None], num_heads).view(tokens.shape)


@fault(caught_by="parity", kind="precision", source="fp8 attention that nobody asked for", dtypes=BFLOAT)
class ValuesInEightBits(Dit):
    """Attention reads its values through float8_e4m3."""

    def heads(self, qkv, num_heads):
        query, key, value = super().heads(qkv, num_heads)
        return query, key, value.to(torch.float8_e4m3fn).float()


@fault(caught_by="inputs_unchanged", kind="memory", source="in-place scaling of latents")
class LatentsClampedInPlace(Dit):
    """Latents are clamped where they lie."""

    def load(self, latents):
        latents.detach().clamp_(-1, 1)
        return super().load(latents)


@fault(caught_by="gradients", kind="gradient", source="frozen embeddings")
class ClassTableFrozen(Dit):
    """The class table gets no gradient."""

    def classes(self, state, labels, config):
        return super().classes(state, labels, config).detach()


@fault(caught_by="gradients", kind="gradient", source="embedding(padding_idx)")
class DroppedLabelFrozen(Dit):
    """The row of the dropped label, as padding, gets no gradient."""

    def classes(self, state, labels, config):
        rows = super().classes(state, labels, config)
        return torch.where((labels == config.num_classes)[:, None], rows.detach(), rows)


@fault(caught_by="state_dict_round_trip", kind="state", source="parameters zipped with the keys of a checkpoint")
class BlocksByPlace(Dit):
    """Entries of a block are taken in the order in which the dict holds them."""

    def block(self, state, tokens, conditioning, config):
        names = [
            f"{module}.{kind}"
            for module in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
            for kind in ("weight", "bias")
        ]
        return super().block(dict(zip(names, state.values(), strict=True)), tokens, conditioning, config)
