"""Bugs of ports of masked and block diffusion language models.

Not there: places that run on from one packed sample to the next. A rotary embedding sees differences alone, and within a sample
these stay what they are.
"""

from typing import ClassVar

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.language_models import Dream, Llada, Sdar, SdarCached, SdarMoe, SdarTraining


@fault(caught_by="parity", kind="structural", source="masks by the place in a block: q_idx % B")
class MaskByPlaceInBlock(Sdar):
    """The block of a place is its place in its block."""

    def blocks(self, places, config):
        return places % config.block_length


@fault(caught_by="parity", kind="structural", source="Qwen3's own causal mask")
class CausalInsideBlocks(Sdar):
    """A token sees those before it alone."""

    def blocks(self, places, config):
        return places


@fault(caught_by="parity", kind="structural", source="prefill under a full mask")
class PrefillSeesEverything(Sdar):
    """Every token sees every token."""

    def blocks(self, places, config):
        return torch.zeros_like(places)


@fault(caught_by="parity", kind="boundary", source="blocks counted from the first decoded token")
class BlocksOffByOne(Sdar):
    """The first block is shorter by one."""

    def blocks(self, places, config):
        return (places + 1) // config.block_length


@fault(caught_by="parity", kind="structural", source="RoPE pairs of neighbours for half-split ones")
class RopeInterleaved(Sdar):
    """Features 2 i and 2 i + 1 are a pair."""

    def rotated(self, heads, angles):
        cos, sin = angles.cos().float(), angles.sin().float()
        x, y = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([x * cos - y * sin, y * cos + x * sin], -1).flatten(-2)


@fault(caught_by="parity", kind="structural", source="QK norm after RoPE")
class NormAfterRope(Sdar):
    """Heads are turned, then normalized, whose weights differ within a pair."""

    def turned(self, state, name, query, key, places, config):
        angles = self.angles(places, config)[:, None]
        query, key = self.rotated(query, angles), self.rotated(key, angles)
        return self.norm(state, f"{name}.q_norm", query, config), self.norm(state, f"{name}.k_norm", key, config)


@fault(caught_by="parity", kind="structural", source="Qwen2's attention for Qwen3's")
class QkNormLeftOut(Sdar):
    """Heads are not normalized."""

    def turned(self, state, name, query, key, places, config):
        angles = self.angles(places, config)[:, None]
        return self.rotated(query, angles), self.rotated(key, angles)


@fault(caught_by="parity", kind="structural", source="OLMo's QK norm")
class QkNormOverAllHeads(Sdar):
    """Mean squares are of all heads of a token together."""

    def turned(self, state, name, query, key, places, config):
        def normed(heads, weight):
            mean_square = heads.square().mean((1, 3), keepdim=True)
            return heads * (mean_square + config.rms_norm_eps).rsqrt() * state[f"{name}.{weight}.weight"]

        angles = self.angles(places, config)[:, None]
        return self.rotated(normed(query, "q_norm"), angles), self.rotated(normed(key, "k_norm"), angles)


@fault(caught_by="parity", kind="structural", source="repeat for repeat_interleave")
class KeysInTurns(Sdar):
    """Heads of keys are dealt to heads of queries in turns."""

    def shared(self, heads, config):
        return heads[:, torch.arange(config.num_attention_heads) % config.num_key_value_heads]


@fault(caught_by="parity", kind="precision", source="SDAR's config class, whose rope_theta is 10000")
class ThetaOfTheClass(Sdar):
    """rope_theta is the default of the config's class."""

    def theta(self, config):
        return 10000.0


@fault(caught_by="parity", kind="precision", source="head_dim = hidden_size / num_attention_heads")
class ScaleByTheWidth(Sdar):
    """Scores are scaled by the width of a token over the number of heads."""

    def attention(self, state, name, hidden, places, may_look, past, config):
        self.features = config.hidden_size / config.num_attention_heads
        return super().attention(state, name, hidden, places, may_look, past, config)

    def scale(self, query):
        return self.features**-0.5


@fault(caught_by="parity", kind="precision", source="rms_norm_eps 1e-6 by default")
class EpsByDefault(Sdar):
    """Every norm has 1e-6."""

    def eps(self, config):
        return 1e-6


@fault(caught_by="parity", kind="structural", source="Dream's shift in a model without one")
class ShiftedLikeDream(Sdar):
    """Each token is predicted by the one before it."""

    def decode(self, state, *arguments):
        logits, *others = super().decode(state, *arguments)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1), *others


@fault(caught_by="gradients", kind="gradient", source="nn.Embedding(padding_idx=...)")
class FirstTokenFrozen(Sdar):
    """The row of token 0, as padding, gets no gradient."""

    def embed(self, state, ids):
        table = state["model.embed_tokens.weight"]
        return torch.cat([table[:1].detach(), table[1:]])[ids.long()]


@fault(caught_by="same_pointer_new_data", kind="state", source="masks and angles cached by their sizes, tokens with them")
class EmbeddingsKept(Sdar):
    """The embeddings of tokens of one size are looked up once."""

    def __init__(self):
        self.cache = {}

    def embed(self, state, ids):
        fresh = super().embed(state, ids)
        return self.cache.setdefault(fresh.shape, fresh.detach()) + (fresh - fresh.detach())


@fault(caught_by="parity", kind="structural", source="norm_topk_prob taken from the config class, where it is false")
class NeverRenormalized(SdarMoe):
    """Weights of the chosen experts are their probabilities."""

    def is_renormalized(self, config):
        return False


@fault(caught_by="parity", kind="structural", source="Mixtral's layer for Qwen3-MoE's")
class AlwaysRenormalized(SdarMoe):
    """Weights of the chosen experts sum to 1."""

    def is_renormalized(self, config):
        return True


@fault(caught_by="parity", kind="structural", source="routers that return probabilities")
class RouterProbabilities(SdarMoe):
    """Logits are returned after their softmax."""

    def returned(self, logits):
        return logits.softmax(-1)


@fault(caught_by="gradients", kind="gradient", source="routing under no_grad")
class RouterFrozen(SdarMoe):
    """The weights of experts get no gradient."""

    def scores(self, logits):
        return super().scores(logits).detach()


@fault(caught_by="parity", kind="structural", source="w1 and w3 of an expert in the other order")
class UpIsGate(SdarMoe):
    """What is activated is the other half."""

    def gated(self, gate, up):
        return super().gated(up, gate)


@fault(caught_by="parity", kind="structural", source="places counted from the first token given")
class PlacesWithoutPast(SdarCached):
    """The tokens after a past have the places of its first ones."""

    def places(self, ids, past):
        return super().places(ids, 0)


@fault(caught_by="parity", kind="structural", source="keys kept before they are turned")
class KeysKeptUnturned(SdarCached):
    """The keys that are returned are normalized, but not turned."""

    def attention(self, state, name, hidden, places, may_look, past, config):
        attended, (_, value) = super().attention(state, name, hidden, places, may_look, past, config)
        _, key, _ = self.heads(state, name, hidden, config)
        return attended, (self.norm(state, f"{name}.k_norm", key, config), value)


@fault(caught_by="parity", kind="structural", source="a past under the mask of its own block")
class PastUnseen(SdarCached):
    """A token sees what is given, not what is kept."""

    def may_look(self, num_tokens, past, config):
        return super().may_look(num_tokens, past, config) & (torch.arange(past + num_tokens) >= past)


@fault(caught_by="parity", kind="structural", source="one mask for decoding and prefill")
class WholeBlockAssumed(SdarCached):
    """What is given is taken for one block, a prompt as well."""

    def may_look(self, num_tokens, past, config):
        return torch.ones(num_tokens, past + num_tokens, dtype=torch.bool)


@fault(caught_by="same_pointer_new_data", kind="state", source="SDAR: keys and values of a noisy block must not be kept")
class NoisyBlockKept(SdarCached):
    """What the first pass over a block made of it is what later ones see."""

    def __init__(self):
        self.kept = {}

    def heads(self, state, name, hidden, config):
        query, key, value = super().heads(state, name, hidden, config)
        key = self.kept.setdefault((name, key.shape), key.detach()) + (key - key.detach())
        return query, key, value


@fault(caught_by="parity", kind="structural", source="BD3-LM's mask with >= for >: the answer is seen")
class NoisySeesItsCleanBlock(SdarTraining):
    """A noisy token sees the clean copy of its own block."""

    def sees_clean(self, query, key):
        return query >= key


@fault(caught_by="parity", kind="structural", source="a symmetric mask of noisy and clean tokens")
class CleanSeesNoisy(SdarTraining):
    """A clean token sees the noisy copy of its own block."""

    def clean_sees_noisy(self, query, key):
        return query == key


@fault(caught_by="parity", kind="structural", source="positions of the clean copy from n to 2 n - 1")
class CleanPlacesAfterNoisy(SdarTraining):
    """The clean copy has places of its own."""

    def both_places(self, sample_ids):
        noisy = self.in_samples(sample_ids)
        return torch.cat([noisy, noisy + sample_ids.shape[1]], 1)


@fault(caught_by="parity", kind="structural", source="blocks counted in the packed row")
class BlocksOfTheRow(SdarTraining):
    """Blocks do not begin anew with a sample."""

    def both_look(self, sample_ids, config):
        self.in_row = torch.arange(sample_ids.shape[1]).expand(sample_ids.shape)
        return super().both_look(sample_ids, config)

    def blocks(self, places, config):
        return super().blocks(self.in_row, config)


@fault(caught_by="parity", kind="structural", source="packing without a block-diagonal mask")
class SamplesSeeEachOther(SdarTraining):
    """Tokens of one row see each other."""

    def together(self, sample_ids):
        return (sample_ids[:, :, None] >= 0) & (sample_ids[:, None] >= 0)


@fault(caught_by="parity", kind="structural", source="logits of the wrong half")
class LogitsOfTheClean(SdarTraining):
    """The clean tokens' logits are returned."""

    def noisy(self, logits, num_tokens):
        return logits[:, num_tokens:]


@fault(caught_by="parity", kind="structural", source="LLaDA's first model file, which ignores attention_mask")
class PaddingSeen(Llada):
    """The mask is accepted and ignored."""

    def may_look(self, attention_mask):
        return super().may_look(torch.ones_like(attention_mask))


@fault(caught_by="parity", kind="structural", source="Llama's causal mask")
class LladaCausal(Llada):
    """A token sees those before it alone."""

    def may_look(self, attention_mask):
        return super().may_look(attention_mask).tril()


@fault(caught_by="parity", kind="boundary", source="masks of finfo.min: a token that sees nothing sees all alike")
class LostTokensSeeAll(Llada):
    """Scores that are masked are very low, not left out."""

    def attended(self, query, key, value, may_look):
        scores = self.scale(query) * (query.double() @ key.double().mT)
        return (scores.masked_fill(~may_look, -1e30).softmax(-1) @ value.double()).float()


@fault(caught_by="parity", kind="structural", source="position ids from the mask, in a model that has them from 0")
class LladaPlacesFromTheMask(Llada):
    """Padding has no place."""

    def places(self, ids, attention_mask):
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


@fault(caught_by="parity", kind="structural", source="ff_proj taken for the ups and up_proj for the gates")
class GatesAndUpsMistaken(Llada):
    """LLaDA's names are read the wrong way round."""

    NAMES: ClassVar = {**Llada.NAMES, "ff_proj": "mlp.up_proj", "up_proj": "mlp.gate_proj"}


@fault(caught_by="parity", kind="structural", source="ports of Dream as if it were LLaDA")
class NotShifted(Dream):
    """Logits stay where they are."""

    def shifted(self, logits):
        return logits


@fault(caught_by="parity", kind="boundary", source="torch.roll for the shift")
class ShiftedAround(Dream):
    """The first row gets what the last one says."""

    def shifted(self, logits):
        return logits.roll(1, 1)


@fault(caught_by="parity", kind="structural", source="labels shifted for logits")
class ShiftedBack(Dream):
    """Each row gets what the one after it says."""

    def shifted(self, logits):
        return super().shifted(logits.flip(1)).flip(1)


@fault(caught_by="parity", kind="structural", source="padding on the left under positions from 0")
class PlacesWithPadding(Dream):
    """Padding has places too."""

    def places(self, attention_mask):
        return torch.arange(attention_mask.shape[1]).expand(attention_mask.shape)


@fault(caught_by="parity", kind="structural", source="a mask of keys alone")
class PaddingSees(Dream):
    """Padding sees what is no padding."""

    def may_look(self, attention_mask):
        return attention_mask[:, None].expand(-1, attention_mask.shape[1], -1)


@fault(caught_by="parity", kind="structural", source="Llama's attention for Qwen2's")
class BiasesLeftOut(Dream):
    """Queries, keys and values have no bias."""

    def linear(self, state, name, inputs):
        return super().linear({f"{name}.weight": state[f"{name}.weight"]}, name, inputs)


@fault(caught_by="state_dict_round_trip", kind="state", source="parameters zipped with the keys of a checkpoint")
class ParametersByPlace(Dream):
    """Keys and values are taken in the order in which the dict holds them."""

    def heads(self, state, name, hidden, config):
        there = [each.removesuffix(".weight") for each in state if each in (f"{name}.k_proj.weight", f"{name}.v_proj.weight")]
        by_place = {
            f"{name}.{each}_proj.{kind}": state[f"{found}.{kind}"]
            for each, found in zip("kv", there, strict=True)
            for kind in ("weight", "bias")
        }
        return super().heads({**state, **by_place}, name, hidden, config)
