"""Bugs of noise schedules."""

from math import log

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.noise_schedules import Shift


@fault(caught_by="parity", kind="structural", source="diffusers#13243: a flow's shift applied twice")
class ShiftedTwice(Shift):
    """The shifted sigmas are shifted."""

    def shifted(self, sigmas, shift):
        return super().shifted(super().shifted(sigmas, shift), shift)


@fault(caught_by="parity", kind="structural", source="shift towards data: the inverse")
class ShiftedTowardsData(Shift):
    """Odds are divided by the shift."""

    def shifted(self, sigmas, shift):
        return super().shifted(sigmas, 1 / shift)


@fault(caught_by="parity", kind="precision", source="tables in float16")
class TableInFloat16(Shift):
    """The result was held in float16."""

    def shifted(self, sigmas, shift):
        return super().shifted(sigmas, shift).half().float()


@fault(caught_by="parity", kind="structural", source="mu given where exp(mu) is due")
class LogarithmForShift(Shift):
    """The shift's logarithm, plus 1, is taken for the shift."""

    def shifted(self, sigmas, shift):
        return super().shifted(sigmas, max(1 + log(shift), 0.1))
