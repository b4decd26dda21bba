"""Bugs of Flux ports."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.flux import Flux

BFLOAT = ("bfloat16",)


@fault(caught_by="parity", kind="structural", source="Flux ports: rotate_half of Llama")
class HalvesTurned(Flux):
    """A feature's partner is half a head away, not its neighbour."""

    def turn(self, heads, angles):
        pairs = heads.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return super().turn(pairs, angles).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


@fault(caught_by="parity", kind="structural", source="Flux ports: axes swapped")
class RowsAndColumnsSwapped(Flux):
    """The second axis is taken for the column."""

    def places(self, txt_ids, img_ids):
        return super().places(txt_ids, img_ids)[:, [0, 2, 1]]


@fault(caught_by="parity", kind="structural", source="Flux ports: the first axis, of which pipelines say 0, left out")
class FirstAxisLeftOut(Flux):
    """The first axis turns nothing."""

    def places(self, txt_ids, img_ids):
        return super().places(txt_ids, img_ids) * torch.tensor([0.0, 1.0, 1.0])


@fault(caught_by="parity", kind="structural", source="Flux and SD3 ports: text after image")
class PlacesOfTheImageFirst(Flux):
    """Tokens are text, then image; their places are image, then text."""

    def places(self, txt_ids, img_ids):
        return torch.cat([img_ids, txt_ids])


@fault(caught_by="parity", kind="precision", source="Flux ports: angles in low precision", dtypes=BFLOAT)
class AnglesInBfloat16(Flux):
    """Angles are rounded to bfloat16: of 63 rad, to a quarter."""

    def angles(self, places, config):
        return super().angles(places, config).bfloat16().double()


@fault(caught_by="parity", kind="precision", source="diffusers pipelines: ids in the model's dtype", dtypes=BFLOAT)
class PlacesInBfloat16(Flux):
    """Places are bfloat16, where 257 is 256."""

    def places(self, txt_ids, img_ids):
        return super().places(txt_ids, img_ids).bfloat16()


@fault(caught_by="parity", kind="structural", source="Flux ports: theta of another model")
class ThetaOfLlama3(Flux):
    """Theta is 500,000."""

    def frequencies(self, size):
        return super().frequencies(size) ** 1.4247425010840046  # log 500000 / log 10000


@fault(caught_by="parity", kind="structural", source="Flux-dev ports")
class GuidanceIgnored(Flux):
    """The guidance embedding is left out."""

    def steering(self, state, pooled, times, guidance, config):
        of_guidance = self.two_linears(state, "guidance_embedder", self.guidance_waves(guidance)) if config.guidance_embeds else 0
        steering = self.two_linears(state, "timestep_embedder", self.time_waves(times)) + 0 * of_guidance
        return torch.nn.functional.silu(steering + self.two_linears(state, "text_embedder", pooled))


@fault(caught_by="parity", kind="structural", source="Flux-dev ports: the factor 1000 of times alone")
class GuidanceNotScaled(Flux):
    """Guidances are embedded as they are."""

    def guidance_waves(self, guidance):
        return super().guidance_waves(guidance / 1000)


@fault(caught_by="parity", kind="precision", source="diffusers: bfloat16 pipelines, t 750 becomes 752", dtypes=BFLOAT)
class TimesInBfloat16(Flux):
    """Times are multiplied by 1000 in bfloat16."""

    def time_waves(self, times):
        return super().time_waves((1000 * times.bfloat16()).float() / 1000)


@fault(caught_by="parity", kind="structural", source="AdaLayerNormContinuous: scale, shift")
class ShiftBeforeScale(Flux):
    """The final layer's first half is taken for the shift, as in all other layers and in the original checkpoint."""

    def halves(self, *parts):
        return parts[::-1]


@fault(caught_by="parity", kind="structural", source="chunk order of AdaLayerNormZero")
class GatesLast(Flux):
    """Six parts are taken as shift, scale, shift, scale, gate, gate."""

    def parts(self, state, name, steering, count):
        parts = super().parts(state, name, steering, count)
        return tuple(parts[each] for each in (0, 1, 4, 2, 3, 5)) if count == 6 else parts


@fault(caught_by="parity", kind="structural", source="Flux ports: one modulation for both streams")
class TextSteeredAsTheImage(Flux):
    """The text's modulation is that of the image."""

    def double(self, state, image, text, steering, angles, config):
        own = {f"norm1_context.linear.{kind}": state[f"norm1.linear.{kind}"] for kind in ("weight", "bias")}
        return super().double({**state, **own}, image, text, steering, angles, config)


@fault(caught_by="parity", kind="structural", source="SD3 ports: norm_added_q and norm_added_k not loaded")
class TextNormalizedAsTheImage(Flux):
    """Queries and keys of the text have the image's norms."""

    def heads_of(self, state, names, tokens, angles, config):
        return super().heads_of(state, (*names[:3], "attn.norm_q", "attn.norm_k"), tokens, angles, config)


@fault(caught_by="parity", kind="structural", source="QK norm over all heads, as in other models")
class NormOfAllHeads(Flux):
    """The root mean square is that of all heads of a token."""

    def rms_norm(self, heads, weight):
        return heads * (heads.square().mean((1, 3), keepdim=True) + 1e-6).rsqrt() * weight


@fault(caught_by="parity", kind="precision", source="QK norm eps 1e-5 of diffusers' Attention")
class QkNormEps(Flux):
    """The eps of queries and keys is 1e-5."""

    def rms_norm(self, heads, weight):
        return heads * (heads.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@fault(caught_by="parity", kind="precision", source="LayerNorm's default eps")
class LayerNormEps(Flux):
    """Every LayerNorm has 1e-5."""

    def norm(self, tokens, eps):
        return super().norm(tokens, 1e-5)


@fault(caught_by="parity", kind="precision", source="DiT and CLIP ports")
class ExactGelu(Flux):
    """The GELU is the exact one."""

    def gelu(self, inner):
        return torch.nn.functional.gelu(inner)


@fault(caught_by="parity", kind="structural", source="single blocks of Flux ports: linear2")
class FeedForwardBeforeAttention(Flux):
    """The last product of a block with one stream takes the feed-forward network's columns first."""

    def beside(self, attended, inner):
        return torch.cat([inner, attended], -1)


@fault(caught_by="same_pointer_new_data", kind="state", source="rotary tables cached by the number of tokens")
class AnglesKept(Flux):
    """The angles of so many tokens are computed once, wherever the tokens are."""

    def __init__(self):
        self.cache = {}

    def angles(self, places, config):
        return self.cache.setdefault((len(places), config.axes_dims_rope), super().angles(places, config))


@fault(caught_by="inputs_unchanged", kind="memory", source="`timestep *= 1000`")
class TimesScaledInPlace(Flux):
    """Times are multiplied by 1000 where they lie."""

    def steering(self, state, pooled, times, guidance, config):
        before = times.clone()
        times.mul_(1000)
        return super().steering(state, pooled, before, guidance, config)


@fault(caught_by="gradients", kind="gradient", source="text encoders are frozen, their projections are not")
class TextDetached(Flux):
    """No gradient flows into the text where the streams become one."""

    def join(self, text, image):
        return super().join(text.detach() if text.ndim == 3 else text, image)


@fault(caught_by="nan_containment", kind="structural", source="tokens flattened over the batch without a mask")
class AttendsAcrossTheBatch(Flux):
    """The tokens of all examples are one sequence."""

    def attend(self, query, key, value):
        batch_size = len(query)
        as_one = (each.transpose(0, 1).flatten(1, 2)[None] for each in (query, key, value))
        return super().attend(*as_one).unflatten(1, (batch_size, -1))[0]
