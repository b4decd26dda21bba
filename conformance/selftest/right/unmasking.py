"""Right but different ways to choose places."""

import torch

from gaugeblock.conformance.selftest.simulated.unmasking import PlaceChoice
from gaugeblock.conformance.selftest.variant import right


@right()
class RanksByASort(PlaceChoice):
    """Places are sorted, masks before all others, and what stands before a place counted."""

    def best(self, ranks, is_masked, counts):
        order = torch.where(is_masked, ranks, ranks.shape[1]).argsort(dim=-1, stable=True)
        kept = torch.arange(ranks.shape[1]) < counts.clamp(max=is_masked.sum(-1))[:, None]
        return torch.zeros_like(is_masked).scatter(-1, order, kept)


@right()
class SumsOfSortedEntropies(PlaceChoice):
    """Entropies are added up in their order."""

    def bounded(self, confidence, is_masked, ahead, bound):
        ordered = torch.where(is_masked, -confidence.double(), torch.inf).sort(-1).values
        return self.at_least_one(self.fits(ordered.cumsum(-1), bound).sum(-1))
