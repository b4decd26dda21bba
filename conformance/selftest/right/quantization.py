"""Right but different quantization."""

from gaugeblock.conformance.selftest.simulated.quantization import TokenGroups
from gaugeblock.conformance.selftest.variant import right
from gaugeblock.reference.configs import E4M3_MAX


@right()
class GroupByGroup(TokenGroups):
    """One group after the other."""


@right()
class QuotientsByReciprocals(TokenGroups):
    """A group is multiplied by the reciprocal of its scale."""

    def quotient(self, group, scales):
        return group * (1 / scales)


@right()
class ScalesByAReciprocal(TokenGroups):
    """The largest element is multiplied by 1 / 448."""

    def scale(self, hidden, columns):
        return self.largest(hidden[:, columns]) * (1 / E4M3_MAX)
