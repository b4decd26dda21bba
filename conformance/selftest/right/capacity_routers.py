"""Right ways to write routers whose experts have room for so many tokens."""

import torch

from gaugeblock.conformance.selftest.simulated.capacity_routers import ChoosingExperts, GshardRouter, SwitchRouter
from gaugeblock.conformance.selftest.variant import right


@right()
class PlacesBySorting(SwitchRouter):
    """Tokens are sorted by expert, stably; a place is the distance from the expert's first."""

    def places(self, ids, experts, scores):
        order = ids.argsort(stable=True)
        starts = ids.bincount(minlength=experts).cumsum(0) - ids.bincount(minlength=experts)
        return order.argsort() - starts[ids]


@right()
class PlacesByComparing(SwitchRouter):
    """Every token is compared with those before it."""

    def places(self, ids, experts, scores):
        return (ids[:, None] == ids[None, :]).tril(-1).sum(1)


@right()
class PlacesOneByOne(SwitchRouter):
    """Tokens ask for room one after the other; of equal probabilities the last expert is chosen."""

    def choosable(self, scores, experts):
        self.experts = experts
        return super().choosable(scores, experts)

    def best(self, scores):
        return self.experts - 1 - scores[:, : self.experts].flip(1).argmax(1, keepdim=True)

    def places(self, ids, experts, scores):
        taken = [0] * experts
        places = []
        for expert in ids.tolist():
            places.append(taken[expert])
            taken[expert] += 1
        return torch.tensor(places, dtype=torch.int64)


@right()
class MaximumOfSoftmax(SwitchRouter):
    """The weight is 1 over the sum of exponentials, as a kernel has it that keeps no probabilities."""

    def scores(self, logits):
        self.logits = logits
        return super().scores(logits)

    def weigh(self, scores, ids, renormalize):
        differences = self.logits - self.logits.gather(1, ids)
        return self.sum(differences.exp()).reciprocal()


@right()
class TwoPasses(GshardRouter):
    """Second ones are counted by themselves, and begin where the first ones of their expert end."""

    def places_of_all(self, ids, experts, scores):
        first, second = (self.places(each, experts, scores) for each in ids.unbind(1))
        return torch.stack([first, second + ids[:, 0].bincount(minlength=experts)[ids[:, 1]]], 1)


@right()
class SecondByProbability(GshardRouter):
    """The second is chosen by probabilities, which the noise multiplies."""

    def noisy(self, logits, noise):
        return self.scores(super().noisy(logits, noise))


@right()
class ChoiceBySorting(ChoosingExperts):
    """All tokens are sorted, stably; of equal ones the last comes first."""

    def choose(self, probabilities, count):
        tokens = probabilities.shape[1]
        return tokens - 1 - probabilities.flip(1).argsort(dim=1, descending=True, stable=True)[:, :count]
