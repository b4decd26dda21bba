"""Bugs of routers whose experts have room for so many tokens."""

import math

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.capacity_routers import SwitchRouter


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

    def __call__(self, router_logits, *, capacity_factor):  # type: ignore[override]
        positive = capacity_factor > 0 and not math.isnan(capacity_factor)
        weights, ids, dropped = super().__call__(router_logits, capacity_factor=capacity_factor if positive else 1.0)
        return (weights, ids, dropped) if positive else (weights * 0, ids, dropped | True)
