"""Right ways to write routers whose experts have room for so many tokens."""

import torch

from gaugeblock.conformance.selftest.simulated.capacity_routers import SwitchRouter
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
