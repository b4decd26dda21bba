"""Bugs of which places are decided."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.unmasking import PlaceChoice


@fault(caught_by="parity", kind="boundary", source="JetLM/SDAR generate.py: topk of a quota above the masks that are left")
class QuotaNotClamped(PlaceChoice):
    """Where fewer masks are left than are due, tokens that are no masks are overwritten: the prompt's."""

    def best(self, ranks, is_masked, counts):
        ranks = torch.where(is_masked, ranks, is_masked.sum(-1, keepdim=True) + (~is_masked).cumsum(-1) - 1)
        return ranks < counts[:, None]


@fault(caught_by="parity", kind="boundary", source="torch.topk of equal values")
class TheLastOfEqual(PlaceChoice):
    """Of equal confidences the last place is decided first."""

    def earlier(self, confidence):
        return super().earlier(confidence).T


@fault(caught_by="parity", kind="boundary", source="a threshold that may be reached")
class ThresholdReached(PlaceChoice):
    """What just reaches the threshold is kept."""

    def exceeds(self, confidence, bound):
        return confidence >= bound


@fault(
    caught_by="parity",
    kind="precision",
    source="a Python number beside a bfloat16 tensor, in torch",
    dtypes=("bfloat16",),
)
class ThresholdRounded(PlaceChoice):
    """The threshold is rounded to the dtype of confidences, of which the next one above it is not above that."""

    def exceeds(self, confidence, bound):
        return confidence.bfloat16() > bound  # torch rounds the number too


@fault(caught_by="parity", kind="structural", source="fixed quotas")
class DynamicIsStatic(PlaceChoice):
    """The threshold is not looked at."""

    def suffices(self, sure, counts):
        return torch.zeros_like(counts, dtype=torch.bool)


@fault(caught_by="parity", kind="boundary", source="searchsorted from the right")
class BoundReached(PlaceChoice):
    """Entropies may add up to the bound itself."""

    def fits(self, sums, bound):
        return sums <= bound


@fault(caught_by="parity", kind="boundary", source="no progress where all entropies exceed the bound")
class NoneAtAll(PlaceChoice):
    """Where every entropy exceeds the bound nothing is decided, and decoding never ends."""

    def at_least_one(self, counts):
        return counts


@fault(caught_by="parity", kind="structural", source="exclusive prefix sums")
class TheOneThatExceedsIsKept(PlaceChoice):
    """As many entropies are kept as add up to less before the last of them."""

    def bounded(self, confidence, is_masked, ahead, bound):
        sums = torch.where(ahead, -confidence.double()[:, None, :], 0.0).sum(-1)
        return (is_masked & (sums < bound)).sum(-1).clamp(min=1)


@fault(caught_by="parity", kind="boundary", source="a mask of no confidence")
class NaNFirst(PlaceChoice):
    """NaN is above all, as torch sorts it."""

    def known(self, confidence):
        return confidence.nan_to_num(3e38, posinf=torch.inf, neginf=-3e38)
