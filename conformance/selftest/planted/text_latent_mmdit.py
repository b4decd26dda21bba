"""Bugs of ports of the text-latent MMDiT."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.text_latent_mmdit import TextLatentMmdit


@fault(caught_by="parity", kind="structural", source="adaLN as DiT has it: 1 + scale")
class OneMoreThanTheScale(TextLatentMmdit):
    """Normalized tokens are multiplied by 1 + scale."""

    def modulate(self, normalized, scale, shift):
        return normalized * (1 + scale) + shift


@fault(caught_by="parity", kind="structural", source="adaLN as DiT has it: the shift comes first")
class ShiftFirst(TextLatentMmdit):
    """Scale and shift are taken for each other."""

    def modulate(self, normalized, scale, shift):
        return normalized * shift + scale


@fault(caught_by="parity", kind="structural", source="hyper-connections: AttentionPoolReduceStream, means for sums")
class FirstStreamAlone(TextLatentMmdit):
    """In the end the first stream is taken."""

    def joined(self, streams):
        return streams[:, :, 0]


@fault(caught_by="parity", kind="structural", source="masks of two meanings: 1 for padding in torch's own encoder")
class MaskInverted(TextLatentMmdit):
    """Padding is seen, and no text."""

    def may_look(self, attention_mask):
        return super().may_look(~attention_mask)


@fault(caught_by="parity", kind="structural", source="a mask that is accepted and ignored")
class PaddingSeen(TextLatentMmdit):
    """Padding is seen too."""

    def may_look(self, attention_mask):
        return super().may_look(torch.ones_like(attention_mask))


@fault(caught_by="parity", kind="boundary", source="masks of the text alone, padded with 0 for the latent")
class LatentMasked(TextLatentMmdit):
    """The latent is seen where the text has no token alone."""

    def may_look(self, attention_mask):
        seen = super().may_look(attention_mask).clone()
        seen[..., -1] = ~attention_mask.any(-1)[:, None, None]
        return seen


@fault(caught_by="parity", kind="structural", source="diffusion models whose times are in thousandths")
class TimesInThousandths(TextLatentMmdit):
    """Times are multiplied by 1000."""

    def waves(self, times):
        return super().waves(1000 * times)


@fault(caught_by="parity", kind="structural", source="sines before cosines: Flux ports, flip_sin_to_cos")
class SinesFirst(TextLatentMmdit):
    """Sines come before cosines."""

    def waves(self, times):
        return super().waves(times).roll(128, 1)


@fault(caught_by="parity", kind="structural", source="two times of one type: arguments exchanged")
class TimesExchanged(TextLatentMmdit):
    """The latent's time is taken for the text's."""

    def conditions(self, state, text_times, latent_times):
        return super().conditions(state, latent_times, text_times)


@fault(caught_by="parity", kind="structural", source="time embeddings joined without their last activation")
class SiluForgotten(TextLatentMmdit):
    """Both times' embeddings are joined as they are."""

    def joint_times(self, both):
        return torch.cat(both, 1)


@fault(caught_by="parity", kind="structural", source="chunks of four gates taken modality by modality")
class GatesByModality(TextLatentMmdit):
    """The latent's attention has the gate of the text's feed-forward network."""

    def order_of_gates(self, gates):
        return gates[0], gates[2], gates[1], gates[3]


@fault(caught_by="parity", kind="structural", source="Stable Diffusion 3 has the image first")
class ResultsOfTheOtherOrder(TextLatentMmdit):
    """Keys, queries and values of the latent come first; results are cut as if the text did."""

    def in_order(self, heads):
        return heads[::-1]


@fault(caught_by="parity", kind="structural", source="`n_heads` of the configuration, which the public class ignores")
class FourHeads(TextLatentMmdit):
    """Attention has four heads of 128."""

    def heads(self, state, name, tokens):
        heads = super().heads(state, name, tokens)
        return tuple(each.transpose(1, 2).flatten(2).unflatten(-1, (4, 128)).transpose(1, 2) for each in heads)

    def root(self):
        return 128**0.5


@fault(caught_by="parity", kind="structural", source="`qk_rmsnorm`, which mmdit 0.3.0 accepts and ignores")
class HeadsNormalized(TextLatentMmdit):
    """Heads of queries and keys are normalized."""

    def heads(self, state, name, tokens):
        query, key, value = super().heads(state, name, tokens)
        return self.unit(query), self.unit(key), value


@fault(caught_by="parity", kind="precision", source="tanh GELU for exact GELU: DiT's and MMDiT's")
class GeluByTanh(TextLatentMmdit):
    """The exact GELU is approximated."""

    def gelu(self, inner):
        return functional.gelu(inner, approximate="tanh")


@fault(caught_by="parity", kind="precision", source="LayerNorm eps 1e-5 / 1e-6 mixed up")
class EpsOfDit(TextLatentMmdit):
    """Every LayerNorm has 1e-6."""

    def eps(self):
        return 1e-6


@fault(caught_by="gradients", kind="gradient", source="a latent that is detached for the cycle's sake")
class LatentDetached(TextLatentMmdit):
    """Latents get no gradient."""

    def embed_latents(self, state, latents):
        return super().embed_latents(state, latents.detach()) + 0 * latents.sum()


@fault(caught_by="state_dict_round_trip", kind="state", source="parameters zipped with the keys of a checkpoint")
class ModalitiesByPlace(TextLatentMmdit):
    """Text and latent have the networks that the dict holds first and second."""

    def feed_forward(self, state, name, tokens):
        prefix, modality = name.removesuffix(".ff").rsplit(".", 1)
        found = [each.split(".")[4] for each in state if each.startswith(prefix) and each.endswith(".ff.0.0.weight")]
        return super().feed_forward(state, f"{prefix}.{found[int(modality)]}.ff", tokens)
