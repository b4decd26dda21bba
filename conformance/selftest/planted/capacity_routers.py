"""Bugs of routers whose experts have room for so many tokens."""

import math

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.capacity_routers import ChoosingExperts, GshardRouter, SwitchRouter


@fault(caught_by="parity", kind="boundary", source="Switch ports")
class CapacityRoundedDown(SwitchRouter):
    """Where the quotient is no integer, an expert has room for one token less."""

    def capacity(self, tokens, experts, capacity_factor):
        return int(tokens * capacity_factor / experts)


@fault(caught_by="parity", kind="boundary", source="Switch ports", smallest=2)
class CapacityOffByOne(SwitchRouter):
    """One token more than there is room for is kept."""

    def dropped(self, places, capacity, ids):
        return places > capacity


@fault(caught_by="parity", kind="boundary", source="Megatron-LM#5542")
class CapacityOfPaddedTokens(SwitchRouter):
    """The number of tokens is that of the padded batch, so experts have more room."""

    def capacity(self, tokens, experts, capacity_factor):
        return super().capacity(-(-tokens // 16) * 16, experts, capacity_factor)


@fault(caught_by="parity", kind="structural", source="Megatron-LM#5542")
class PaddingTakesRoom(SwitchRouter):
    """Rows of zeros that fill the first tile choose expert 0, before the tokens do."""

    def places(self, ids, experts, scores):
        padding = -len(ids) % 16
        return super().places(torch.cat([ids.new_zeros(padding), ids]), experts, scores)[padding:]


@fault(caught_by="parity", kind="structural", source="Switch ports", smallest=2)
class FirstTokensDropped(SwitchRouter):
    """An expert keeps its last tokens."""

    def places(self, ids, experts, scores):
        return super().places(ids.flip(0), experts, scores).flip(0)


@fault(caught_by="parity", kind="structural", source="V-MoE's batch prioritized routing")
class LeastProbableDropped(SwitchRouter):
    """An expert keeps the tokens to which it is most probable."""

    def places(self, ids, experts, scores):
        order = scores.detach().amax(1).argsort(descending=True, stable=True)
        return super().places(ids[order], experts, scores)[order.argsort()]


@fault(caught_by="parity", kind="structural", source="transformers#37017", smallest=2)
class DroppedKeepsItsWeight(SwitchRouter):
    """A dropped token's weight is its probability, so that it passes scaled instead of not at all."""

    def keep(self, weights, dropped):
        return weights


@fault(caught_by="parity", kind="structural", smallest=1)
class KeptForDropped(SwitchRouter):
    """The mask is of those that are kept."""

    def returned(self, ids, dropped):
        return ids, ~dropped


@fault(caught_by="parity", kind="structural", source="maxtext#4826")
class DroppedGoesToExpertZero(SwitchRouter):
    """The id of a dropped token is 0, as a one-hot row of zeros says by argmax."""

    def returned(self, ids, dropped):
        return torch.where(dropped, 0, ids), dropped


@fault(caught_by="parity", kind="boundary", source="scans of one block")
class PlacesStartAgain(SwitchRouter):
    """Counts are not carried from one block of tokens to the next."""

    def carried(self, counts, chosen):
        return counts


@fault(caught_by="parity", kind="boundary", source="scans of several blocks")
class LastBlockCarriedAlone(SwitchRouter):
    """Counts are those of the block before, not of all before."""

    def carried(self, counts, chosen):
        return chosen.sum(0)


@fault(caught_by="parity", kind="precision", source="Megatron-LM#7081")
class CountsInBfloat16(SwitchRouter):
    """Above 256 tokens of one expert, one more does not count."""

    def no_counts(self, experts):
        return torch.zeros(experts, dtype=torch.bfloat16)


@fault(caught_by="parity", kind="boundary", source="kekzl/imp#2056")
class CountsInBytes(SwitchRouter):
    """Counts of tokens wrap at 256."""

    def carried(self, counts, chosen):
        return super().carried(counts, chosen) % 256


@fault(caught_by="parity", kind="structural", source="megablocks#87")
class NormalizedOverTokens(SwitchRouter):
    """The softmax is taken over the tokens."""

    def scores(self, logits):
        return logits.double().softmax(0).float()


@fault(caught_by="gradients", kind="gradient", source="transformers#48687", smallest=2)
class GradientOfTheDropped(SwitchRouter):
    """A dropped token's weight is 0, and its gradient is not."""

    def keep(self, weights, dropped):
        return weights - torch.where(dropped, weights, 0.0).detach()


@fault(caught_by="gradients", kind="gradient")
class ProbabilityIsItsOwnLogit(SwitchRouter):
    """The gradient reaches the chosen logit and none of its rivals."""

    def scores(self, logits):
        scores = super().scores(logits.detach())
        return scores + scores * (logits - logits.detach()).nan_to_num()


@fault(caught_by="same_pointer_new_data", kind="state", source="KernelBench exploits")
class PlacesKeptByShape(SwitchRouter):
    """Places are computed once for each number of tokens and experts."""

    def __init__(self):
        self.kept: dict[tuple[int, int], torch.Tensor] = {}

    def places(self, ids, experts, scores):
        return self.kept.setdefault((len(ids), experts), super().places(ids, experts, scores))


@fault(caught_by="rejections", kind="error-contract")
class AnyCapacityWillDo(SwitchRouter):
    """A capacity that is no positive number drops all tokens instead of being rejected."""

    def __call__(self, router_logits, *, capacity_factor):
        positive = capacity_factor > 0 and not math.isnan(capacity_factor)
        weights, ids, dropped = super().__call__(router_logits, capacity_factor=capacity_factor if positive else 1.0)
        return (weights, ids, dropped) if positive else (weights * 0, ids, dropped | True)


@fault(caught_by="parity", kind="structural", source="Megatron-LM#5542")
class NotAskedTakesRoom(GshardRouter):
    """Padding, and second experts that the draw refuses, take room in expert 0."""

    def places_of_all(self, ids, experts, scores):
        return super().places_of_all(torch.where(ids == experts - 1, 0, ids), experts, scores)


@fault(caught_by="parity", kind="structural")
class TokenAfterToken(GshardRouter):
    """A token asks for both its experts before the next one asks for its first."""

    def places_of_all(self, ids, experts, scores):
        return self.places(ids.flatten(), experts, scores).view(-1, 2)


@fault(caught_by="parity", kind="structural")
class SecondOnesFindNobody(GshardRouter):
    """Places of the second ones do not start behind those of the first."""

    def places_of_all(self, ids, experts, scores):
        return torch.stack([self.places(each, experts, scores) for each in ids.unbind(1)], 1)


@fault(caught_by="parity", kind="structural", source="transformers' NllbMoeTop2Router")
class SecondNotNormalized(GshardRouter):
    """With "random", the second weight is computed anew after both were normalized."""

    def before_dropping(self, weights):
        normalized = super().before_dropping(weights)
        return torch.stack([normalized[:, 0], weights[:, 1]], 1) if self.policy == "random" else normalized


@fault(caught_by="parity", kind="structural")
class NormalizedBeforeAndAfter(GshardRouter):
    """A token of which one expert is dropped gives all its weight to the other, whatever the option says."""

    def after_dropping(self, weights):
        return weights / self.divisor(weights)


@fault(caught_by="parity", kind="structural")
class FirstDrawnToo(GshardRouter):
    """The noise that samples the second expert moves the first one, too."""

    def two(self, scores, noisy, experts):
        return super().two(self.scores(noisy), noisy, experts)


@fault(caught_by="parity", kind="structural")
class DrawnHalfAsOften(GshardRouter):
    """The second expert is asked with its probability, not with twice that."""

    def drawn(self, weights, noise):
        return weights > noise


@fault(caught_by="parity", kind="structural")
class FirstNeedsLuckToo(GshardRouter):
    """The draw decides on both experts."""

    def asks(self, weights, noise, ids, attention_mask):
        asks = super().asks(weights, noise, ids, attention_mask)
        return asks & self.drawn(weights, noise.gather(1, ids)) if self.policy == "random" else asks


@fault(caught_by="parity", kind="boundary")
class DividesByNothing(GshardRouter):
    """Where both experts are dropped, weights are 0 / 0."""

    def divisor(self, weights):
        return self.sum(weights)


@fault(caught_by="parity", kind="boundary", source="transformers' NllbMoeTop2Router")
class SecondIsTheFirst(GshardRouter):
    """The first is taken out by -inf; where all others are -inf, it comes second as well."""

    def two(self, scores, noisy, experts):
        first = self.best(self.choosable(scores, experts))
        return torch.cat([first, self.best(self.take(self.choosable(noisy, experts), first))], 1)


@fault(caught_by="gradients", kind="gradient")
class DivisorWithoutGradient(GshardRouter):
    """The sum of what is kept is taken for a constant."""

    def divisor(self, weights):
        return super().divisor(weights).detach()


@fault(caught_by="gradients", kind="gradient")
class GradientThroughPadding(GshardRouter):
    """Padding is masked behind the softmax alone: its gradient of zero times NaN is NaN."""

    def unpadded(self, logits, attention_mask):
        return logits


@fault(caught_by="parity", kind="structural", source="megablocks#87")
class ExpertsShareTokens(ChoosingExperts):
    """The softmax is taken over the tokens."""

    def scores(self, logits):
        return logits.double().softmax(0).float()


@fault(caught_by="parity", kind="boundary")
class RoomRoundedDown(ChoosingExperts):
    """Where the quotient is no integer, an expert chooses one token less."""

    def count(self, tokens, experts, capacity_factor):
        return min(int(tokens * capacity_factor / experts), tokens)


@fault(caught_by="parity", kind="boundary", source="kekzl/imp#2056")
class TokenIdsInBytes(ChoosingExperts):
    """Ids of tokens wrap at 256."""

    def choose(self, probabilities, count):
        return super().choose(probabilities, count) % 256


@fault(caught_by="parity", kind="structural")
class SameTokenAgain(ChoosingExperts):
    """A chosen token is taken out by probability 0, and chosen again where that is the best that is left."""

    def take(self, scores, best):
        return scores.scatter(1, best, 0.0)


@fault(caught_by="parity", kind="structural")
class SharesOfTheChosen(ChoosingExperts):
    """The weights of an expert's tokens sum to 1."""

    def weigh(self, scores, ids, renormalize):
        return super().weigh(scores, ids, True)


@fault(caught_by="gradients", kind="gradient")
class OwnExpertAlone(ChoosingExperts):
    """The gradient reaches the logit of the choosing expert and none of its rivals."""

    def scores(self, logits):
        scores = super().scores(logits.detach())
        return scores + scores * (logits - logits.detach()).nan_to_num()
