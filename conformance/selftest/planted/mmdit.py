"""Bugs of MMDiT ports."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.mmdit import Mmdit
from gaugeblock.reference.torch.mmdit import POSITIONS

BFLOAT = ("bfloat16",)


@fault(caught_by="parity", kind="structural", source="Flux has the text first, Stable Diffusion 3 the image")
class TextFirst(Mmdit):
    """Keys, queries and values of the text come first; results are cut as if the image did."""

    def in_order(self, of_image, of_text):
        return [of_text, of_image]


@fault(caught_by="parity", kind="structural", source="SimpleTuner#904, axolotl#3735: masks of joint sequences")
class PaddingMasked(Mmdit):
    """Tokens of the text that are all 0 are not attended to."""

    def load_text(self, text):
        self.is_padding = ~text.any(-1)
        return super().load_text(text)

    def attend(self, query, key, value):
        length = self.is_padding.shape[1]
        if key.shape[2] > length:  # not the image by itself
            lost = torch.nn.functional.pad(self.is_padding, (key.shape[2] - length, 0))[:, None, :, None]
            score = torch.where(lost, -1e4, torch.zeros_like(key[..., :1]))  # one feature more
            key, query = torch.cat([key, score], -1), torch.cat([query, torch.ones_like(query[..., :1])], -1)
        return super().attend(query, key, value)

    def root(self, query, num_heads):
        return super().root(query[..., : self.features], num_heads)

    def split(self, tokens, num_heads):
        self.features = tokens.shape[-1] // num_heads
        return super().split(tokens, num_heads)


@fault(caught_by="parity", kind="structural", source="positions cut from the corner, as for other models")
class TableFromItsCorner(Mmdit):
    """Positions count from the first row and column of the table."""

    def margin(self, size, number):
        return 0


@fault(caught_by="parity", kind="boundary", source="centre crops that round the margin to the nearest")
class MarginRoundedUp(Mmdit):
    """What lies before the middle is rounded up."""

    def margin(self, size, number):
        return (size - number + 1) // 2


@fault(caught_by="parity", kind="structural", source="width before height")
class TableTransposed(Mmdit):
    """Rows of the table are taken for columns."""

    def crop(self, table, rows, columns):
        return super().crop(table.transpose(0, 1), rows, columns)


@fault(caught_by="parity", kind="boundary", source="tables for square images")
class SquareTable(Mmdit):
    """The margin of the rows is that of the columns."""

    def crop(self, table, rows, columns):
        left = min(self.margin(len(table), columns), len(table) - rows)
        return table[left : left + rows, self.margin(len(table), columns) :][:, :columns]


@fault(caught_by="parity", kind="structural", source="AdaLayerNormContinuous: scale, shift")
class ShiftBeforeScale(Mmdit):
    """Of the last block's text and at the end, the first half is taken for the shift."""

    def halves(self, scale, shift):
        return scale, shift


@fault(caught_by="parity", kind="structural", source="SD35AdaLayerNormZeroX: chunk order")
class SecondAttentionBeforeTheNetwork(Mmdit):
    """The steering of the second attention is looked for before that of the feed-forward network."""

    def ninths(self, *parts):
        return parts[:3] + parts[6:] + parts[3:6] if len(parts) == 9 else parts


@fault(caught_by="parity", kind="structural", source="dual attention one after the other")
class SecondAttentionSeesTheFirst(Mmdit):
    """The image attends to itself after it has attended to the text."""

    def seen_again(self, tokens, attended):
        return tokens + attended


@fault(caught_by="parity", kind="structural", source="qk_norm of the whole width, as in other models")
class NormOfAllHeads(Mmdit):
    """Queries and keys are normalized over all heads."""

    def rms(self, heads, weight):
        scale = heads.square().mean((1, 3), keepdim=True) + 1e-6
        return heads * scale.rsqrt() * weight


@fault(caught_by="parity", kind="structural", source="norm_added_q and norm_added_k not loaded")
class TextNotNormalized(Mmdit):
    """Queries and keys of the text are not normalized."""

    def own_heads(self, state, names, tokens, config):
        self.is_text = names[0] == "add_q_proj"
        return super().own_heads(state, names, tokens, config)

    def rms(self, heads, weight):
        return heads if self.is_text else super().rms(heads, weight)


@fault(caught_by="parity", kind="precision", source="Attention(eps=1e-5) of diffusers")
class EpsOfAttention(Mmdit):
    """The heads' norm has eps 1e-5."""

    def rms(self, heads, weight):
        return heads * (heads.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@fault(caught_by="parity", kind="precision", source="torch's LayerNorm has 1e-5")
class EpsOfTorch(Mmdit):
    """Every LayerNorm has eps 1e-5."""

    def norm(self, tokens, eps):
        return super().norm(tokens, 1e-5)


@fault(caught_by="parity", kind="precision", source="DiT and CLIP ports")
class ExactGelu(Mmdit):
    """The GELU is the exact one, a thousandth away."""

    def gelu(self, inner):
        return torch.nn.functional.gelu(inner)


@fault(caught_by="parity", kind="precision", source="diffusers and Flux ports", dtypes=BFLOAT)
class TimesInBfloat16(Mmdit):
    """Times 998 and 999 are one."""

    def times(self, timesteps):
        return super().times(timesteps.bfloat16().float())


@fault(caught_by="parity", kind="structural", source="Flux tells its model t in [0, 1], and multiplies by 1000 inside")
class TimesMultipliedAgain(Mmdit):
    """The factor 1000 is applied twice."""

    def times(self, timesteps):
        return super().times(1000 * timesteps)


@fault(caught_by="parity", kind="structural", source="freq_shift 1, as in diffusers' DiT")
class FrequencyShift(Mmdit):
    """The lowest frequency is 1 / 10000."""

    def times(self, timesteps):
        return self.waves(timesteps.double(), 256, 1).float()


@fault(caught_by="parity", kind="structural", source="pooled projections left out, as where there is no guidance")
class PooledIgnored(Mmdit):
    """The vector of the whole text does not count."""

    def conditions(self, state, timesteps, pooled):
        return super().conditions(state, timesteps, torch.zeros_like(pooled))


@fault(caught_by="parity", kind="structural", source="unpatchify of square images")
class ImageTransposed(Mmdit):
    """Patches are put together as if there were as many rows as there are columns."""

    def image(self, patches, rows, config):
        columns = patches.shape[1] // rows
        return super().image(patches, columns, config).reshape(*super().image(patches, rows, config).shape)


@fault(caught_by="parity", kind="structural", source="unpatchify as the inverse of patchify")
class ChannelFirstInTheResult(Mmdit):
    """The last layer's values are taken channel, row, column."""

    def image(self, patches, rows, config):
        return super().image(patches.unflatten(-1, (config.out_channels, -1)).transpose(2, 3).flatten(2), rows, config)


@fault(caught_by="nan_containment", kind="structural", source="tokens flattened over the batch without a mask")
class AttendsAcrossTheBatch(Mmdit):
    """The image's second attention sees the tokens of all examples as one sequence."""

    def second_attention(self, state, tokens, config):
        return super().second_attention(state, tokens.flatten(0, 1)[None], config).view(tokens.shape)


@fault(caught_by="same_pointer_new_data", kind="state", source="text embeddings computed once for all steps")
class TextKept(Mmdit):
    """The text of a batch of one size is embedded once."""

    def __init__(self):
        self.cache = {}

    def load_text(self, text):
        fresh = super().load_text(text)
        return self.cache.setdefault(fresh.shape, fresh.detach().clone()) + (fresh - fresh.detach())


@fault(caught_by="inputs_unchanged", kind="memory", source="tables cropped in place")
class TableChangedInPlace(Mmdit):
    """What is cut out of the table is left zero there."""

    def __call__(self, state, *arguments, config):
        out = super().__call__(state, *arguments, config=config)
        state[POSITIONS].detach()[:, 0] = 0
        return out


@fault(caught_by="gradients", kind="gradient", source="frozen text encoders and what follows them")
class TextEmbedderFrozen(Mmdit):
    """What embeds the text gets no gradient."""

    def linear(self, state, name, inputs):
        out = super().linear(state, name, inputs)
        return out.detach() + 0 * out if name == "context_embedder" else out


@fault(caught_by="state_dict_round_trip", kind="state", source="parameters zipped with the keys of a checkpoint")
class NormsByPlace(Mmdit):
    """The heads' norms are taken in the order in which the dict holds them."""

    def own_heads(self, state, names, tokens, config):
        norms = [each for name, each in state.items() if "norm_q" in name or "norm_k" in name]
        if names[0] == "to_q" and norms:
            state = state | dict(zip(("norm_q.weight", "norm_k.weight"), norms, strict=True))
        return super().own_heads(state, names, tokens, config)
