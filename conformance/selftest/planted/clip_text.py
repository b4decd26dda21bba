"""Bugs of ports of CLIP's text encoder."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.clip_text import ClipText


@fault(caught_by="parity", kind="structural", source="ports that take the text encoder for BERT")
class SeesWhatComesAfter(ClipText):
    """The causal mask is missing."""

    def may_look(self, attention_mask):
        return attention_mask[:, None, None].expand(-1, 1, attention_mask.shape[1], -1)


@fault(caught_by="parity", kind="boundary", source="triu(0) for triu(1)")
class DoesNotSeeItself(ClipText):
    """A token sees those before it, not itself."""

    def may_look(self, attention_mask):
        num_tokens = attention_mask.shape[1]
        return super().may_look(attention_mask) & ~torch.eye(num_tokens, dtype=torch.bool)


@fault(caught_by="parity", kind="structural", source="pipelines that pass no attention_mask")
class PaddingSeen(ClipText):
    """The mask is accepted and ignored."""

    def may_look(self, attention_mask):
        return super().may_look(torch.ones_like(attention_mask))


@fault(caught_by="parity", kind="structural", source="masks of two meanings: 1 for padding in torch's own encoder")
class MaskInverted(ClipText):
    """Padding is seen, and nothing else."""

    def may_look(self, attention_mask):
        return super().may_look(~attention_mask)


@fault(caught_by="parity", kind="boundary", source="masks of finfo.min: a token that sees nothing sees all alike")
class LostTokensSeeAll(ClipText):
    """Scores that are masked are very low, not left out."""

    def attended(self, query, key, value, may_look):
        scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
        return (scores.masked_fill(~may_look, -1e30).softmax(-1) @ value.double()).float()


@fault(caught_by="parity", kind="structural", source="pooled at the last position instead of EOS")
class PooledAtTheLastToken(ClipText):
    """What stands last is pooled, padding or not."""

    def ends(self, ids, config):
        return torch.full((len(ids),), ids.shape[1] - 1)


@fault(caught_by="parity", kind="boundary", source="captions that are padded with the token that ends them")
class PooledAtTheLastEnd(ClipText):
    """Of several tokens that end a caption the last one is pooled."""

    def ends(self, ids, config):
        return ids.shape[1] - 1 - super().ends(ids.flip(1), config)


@fault(caught_by="parity", kind="boundary", source="transformers#24773")
class EosIsTheHighestId(ClipText):
    """The highest id ends a caption, also where tokens were added."""

    def ends(self, ids, config):
        return ids.argmax(1)


@fault(caught_by="parity", kind="boundary", source="transformers#24773: eos_token_id 2 taken by its word")
class LegacyEosByItsWord(ClipText):
    """Token 2 ends a caption, or else its first."""

    def ends(self, ids, config):
        return (ids == config.eos_token_id).int().argmax(1)


@fault(caught_by="parity", kind="structural", source="CLIP ports: what is pooled is the last layer's, not normalized")
class PooledBeforeTheNorm(ClipText):
    """The final LayerNorm is left out where nothing normalized is returned."""

    def last_norm(self, state, hidden, config):
        return super().last_norm(state, hidden, config) if config.normalize_returned else hidden


@fault(caught_by="parity", kind="structural", source="Stable Diffusion XL ports: the penultimate layer normalized")
class ReturnedNormalizedAlways(ClipText):
    """The final LayerNorm is applied to whatever is returned."""

    def is_normalized(self, config):
        return True


@fault(caught_by="parity", kind="boundary", source="clip_skip counted from 0 and from 1")
class OneLayerFurtherBack(ClipText):
    """The layer before the one that was asked for is returned."""

    def returned(self, hidden, config):
        return hidden[max(config.returned_layer % len(hidden) - 1, 0)]


@fault(caught_by="parity", kind="structural", source="Stable Diffusion 2 run with the activation of 1")
class QuickGeluAlways(ClipText):
    """quick-GELU, whatever the configuration says."""

    def activation(self, inner, config):
        return inner * torch.sigmoid(1.702 * inner)


@fault(caught_by="parity", kind="precision", source="tanh GELU for exact GELU: CLIP ports")
class GeluByTanh(ClipText):
    """The exact GELU is approximated."""

    def activation(self, inner, config):
        if config.hidden_act == "gelu":
            return functional.gelu(inner, approximate="tanh")
        return super().activation(inner, config)


@fault(caught_by="parity", kind="precision", source="slope 1.7 for 1.702")
class SlopeOfTwoDigits(ClipText):
    """quick-GELU is x * sigmoid(1.7 x)."""

    def activation(self, inner, config):
        if config.hidden_act == "quick_gelu":
            return inner * torch.sigmoid(1.7 * inner)
        return super().activation(inner, config)


@fault(caught_by="parity", kind="precision", source="LayerNorm eps 1e-5 / 1e-6 mixed up")
class EpsOfVisionTransformers(ClipText):
    """Every LayerNorm has 1e-6."""

    def eps(self, config):
        return 1e-6


@fault(caught_by="parity", kind="structural", source="position ids from the mask, as for padding on the left")
class PlacesFromTheMask(ClipText):
    """Padding has no place: tokens are counted by the mask."""

    def may_look(self, attention_mask):
        return super().may_look(attention_mask)

    def __call__(self, state, input_ids, attention_mask, *, config):
        self.counted = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        return super().__call__(state, input_ids, attention_mask, config=config)

    def places(self, ids):
        return self.counted


@fault(caught_by="parity", kind="boundary", source="RoBERTa's places begin after the padding's id")
class PlacesBeginAtOne(ClipText):
    """The first token has the second place, the last but one and the last share theirs."""

    def places(self, ids):
        return (super().places(ids) + 1).clamp(max=ids.shape[1] - 1)


@fault(caught_by="parity", kind="structural", source="Megatron's fused qkv")
class HeadsInterleaved(ClipText):
    """Features are dealt to heads one by one."""

    def heads(self, state, name, hidden, num_heads):
        heads = super().heads(state, name, hidden, hidden.shape[-1] // num_heads)
        return tuple(each.transpose(1, 3) for each in heads)


@fault(caught_by="parity", kind="structural", source="post-norm ports")
class NormAfterTheSum(ClipText):
    """A layer normalizes what it gives, not what it takes."""

    def layer(self, state, name, hidden, may_look, config):
        attended = self.attention(state, f"{name}.self_attn", hidden, may_look, config.num_attention_heads)
        hidden = self.norm(state, f"{name}.layer_norm1", hidden + attended, config)
        inner = self.activation(self.linear(state, f"{name}.mlp.fc1", hidden), config)
        return self.norm(state, f"{name}.layer_norm2", hidden + self.linear(state, f"{name}.mlp.fc2", inner), config)


@fault(caught_by="gradients", kind="gradient", source="nn.Embedding(padding_idx=...)")
class FirstTokenFrozen(ClipText):
    """The row of token 0, as padding, gets no gradient."""

    def embed(self, state, ids):
        name = "text_model.embeddings.token_embedding.weight"
        table = torch.cat([state[name][:1].detach(), state[name][1:]])
        return super().embed({**state, name: table}, ids)


@fault(caught_by="gradients", kind="gradient", source="train_text_encoder with frozen embeddings")
class PlacesFrozen(ClipText):
    """The table of places gets no gradient."""

    def embed(self, state, ids):
        name = "text_model.embeddings.position_embedding.weight"
        return super().embed({**state, name: state[name].detach()}, ids)


@fault(caught_by="same_pointer_new_data", kind="state", source="embeddings of captions cached by their address")
class PooledKept(ClipText):
    """What is pooled of captions of one size is computed once."""

    def __init__(self):
        self.cache = {}

    def pool(self, hidden, ids, config):
        fresh = super().pool(hidden, ids, config)
        return self.cache.setdefault(fresh.shape, fresh.detach()) + (fresh - fresh.detach())


@fault(caught_by="state_dict_round_trip", kind="state", source="parameters zipped with the keys of a checkpoint")
class ParametersByPlace(ClipText):
    """Queries, keys and values are taken in the order in which the dict holds them."""

    def heads(self, state, name, hidden, num_heads):
        found = [each for each in state if each.startswith(f"{name}.") and each.endswith("_proj.weight") and "out" not in each]
        order = [each.removesuffix(".weight").rpartition(".")[2] for each in found]
        expected = ("q_proj", "k_proj", "v_proj")
        renamed = {
            f"{name}.{wanted}.{kind}": state[f"{name}.{there}.{kind}"]
            for wanted, there in zip(expected, order, strict=True)
            for kind in ("weight", "bias")
        }
        return super().heads(renamed, name, hidden, num_heads)
