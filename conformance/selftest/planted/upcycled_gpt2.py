"""Bugs of upcycled GPT-2s."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.upcycled_gpt2 import PLACES, TOKENS, UpcycledGpt2


@fault(caught_by="parity", kind="structural", source="moe-emergence, design V3: the gate is the softmax probability")
class ProbabilityForOne(UpcycledGpt2):
    """The weight of one expert alone is its probability."""

    def alone(self, chosen):
        return chosen


@fault(caught_by="gradients", kind="gradient", source="renormalized top-1 weights: p / p is 1 and has no gradient")
class NoGradientThroughOne(UpcycledGpt2):
    """The weight of one expert alone is 1, and the router learns nothing of it."""

    def alone(self, chosen):
        return torch.ones_like(chosen)


@fault(caught_by="gradients", kind="gradient", source="straight-through estimators left on in evaluation")
class StraightThroughInEvaluation(UpcycledGpt2):
    """The gradient of one weight flows in evaluation too."""

    def alone(self, chosen):
        return 1 + (chosen - chosen.detach())


@fault(caught_by="parity", kind="structural", source="moe-emergence: after installing, routers are in train mode")
class NoiseInEvaluation(UpcycledGpt2):
    """Noise is added whenever there is any."""

    def layer(self, state, hidden, noise):
        training, self.training = self.training, True
        result = super().layer(state, hidden, noise)
        self.training = training
        return result


@fault(caught_by="parity", kind="structural", source="a router that accepts noise and never adds it")
class NoiseForgotten(UpcycledGpt2):
    """Experts are chosen by the logits alone."""

    def noisy(self, logits, noise):
        return logits + 0 * noise


@fault(caught_by="parity", kind="structural", source="noise on probabilities")
class NoiseOnProbabilities(UpcycledGpt2):
    """Noise is added behind the softmax, and what results is normalized again."""

    def noisy(self, logits, noise):
        return logits.softmax(-1) + noise


@fault(caught_by="parity", kind="structural", source="one draw for all layers")
class NoiseOfTheFirstLayer(UpcycledGpt2):
    """All layers have the noise of the first one."""

    def __call__(self, state, input_ids, noise, *, training, config):
        return super().__call__(state, input_ids, noise[:, :, :1].expand_as(noise), training=training, config=config)


@fault(caught_by="parity", kind="structural", source="entropy measured on noisy probabilities")
class EntropyWithNoise(UpcycledGpt2):
    """A router seems undecided because of the noise."""

    def entropy(self, probs, clean):
        return super().entropy(probs, probs)


@fault(caught_by="parity", kind="structural", source="the balance loss of probabilities that chose nothing")
class ProbabilitiesWithoutNoise(UpcycledGpt2):
    """Of the probabilities those without noise are returned."""

    def told(self, probs, clean):
        return clean


@fault(caught_by="gradients", kind="gradient", source="auxiliary outputs stored detached")
class ProbabilitiesDetached(UpcycledGpt2):
    """No gradient of a balance loss reaches the router."""

    def told(self, probs, clean):
        return probs.detach()


@fault(caught_by="parity", kind="structural", source="top-2 weights as in Switch Transformers: not normalized")
class WeightsOfSeveralNotNormalized(UpcycledGpt2):
    """Several weights are probabilities among all experts."""

    def normalized(self, chosen, probs):
        return chosen


@fault(caught_by="parity", kind="structural", source="loads of first choices alone")
class LoadOfFirstChoices(UpcycledGpt2):
    """Second experts are not counted."""

    def load(self, ids):
        return super().load(ids[..., :1])


@fault(caught_by="parity", kind="structural", source="layers counted from 1")
class LayersWithoutExperts(UpcycledGpt2):
    """The last MoE layer is left out: its tokens stay as they are."""

    def layer(self, state, hidden, noise):
        self.count = getattr(self, "count", 0) + 1
        out, *said = super().layer(state, hidden, noise)
        is_last = self.count % len(self.config.moe_layers) == 0
        return (0 * out if is_last else out), *said


@fault(caught_by="parity", kind="precision", source="GELU by tanh for exact GELU: GPT-2 has gelu_new")
class ExactGelu(UpcycledGpt2):
    """The exact GELU."""

    def gelu(self, inner):
        return functional.gelu(inner)


@fault(caught_by="parity", kind="precision", source="LayerNorm eps 1e-5 / 1e-6 mixed up")
class EpsOfOtherModels(UpcycledGpt2):
    """Every LayerNorm has 1e-6."""

    def eps(self):
        return 1e-6


@fault(caught_by="parity", kind="structural", source="GPT-2 ports: a causal mask forgotten")
class SeesWhatComesAfter(UpcycledGpt2):
    """Every token sees all."""

    def may_look(self, num_tokens):
        return torch.ones(num_tokens, num_tokens, dtype=torch.bool)


@fault(caught_by="parity", kind="structural", source="GPT-2 ports: 1 / sqrt(hidden_size)")
class ScaledByTheWidth(UpcycledGpt2):
    """Scores are divided by the root of the whole width."""

    def scale(self, query):
        return self.config.hidden_size**-0.5


@fault(caught_by="parity", kind="structural", source="Megatron's fused qkv: thirds within each head")
class ThirdsWithinHeads(UpcycledGpt2):
    """Queries, keys and values take turns from head to head."""

    def heads(self, qkv):
        return tuple(each.transpose(1, 2) for each in qkv.unflatten(-1, (self.config.num_attention_heads, -1)).chunk(3, -1))


@fault(caught_by="parity", kind="boundary", source="OPT's places begin at 2")
class PlacesBeginAtOne(UpcycledGpt2):
    """The first token has the second place."""

    def places(self, num_tokens):
        return (super().places(num_tokens) + 1).clamp(max=self.config.max_position_embeddings - 1)


@fault(caught_by="parity", kind="structural", source="GPT-1: norms behind, none at the end")
class NotNormalizedAtTheEnd(UpcycledGpt2):
    """The head takes tokens as they are."""

    def head(self, state, hidden):
        return self.product(hidden, state[TOKENS].mT) + 0 * super().head(state, hidden)


@fault(caught_by="gradients", kind="gradient", source="a head that is a copy: tie_weights forgotten after loading")
class HeadUntied(UpcycledGpt2):
    """The table of tokens gets no gradient of the head."""

    def head(self, state, hidden):
        return super().head({**state, TOKENS: state[TOKENS].detach()}, hidden)


@fault(caught_by="gradients", kind="gradient")
class PlacesFrozen(UpcycledGpt2):
    """The table of places gets no gradient."""

    def embed(self, state, ids):
        return super().embed({**state, PLACES: state[PLACES].detach()}, ids)


@fault(caught_by="same_pointer_new_data", kind="state", source="last_aux read before it is overwritten")
class RoutingOfTheCallBefore(UpcycledGpt2):
    """The load is that of the first call."""

    def __init__(self):
        self.loads = {}

    def load(self, ids):
        return self.loads.setdefault(tuple(ids.shape), super().load(ids))
