"""Right but different schedules."""

from gaugeblock.conformance.selftest.simulated.noise_schedules import Shift
from gaugeblock.conformance.selftest.variant import right


@right()
class ShiftInFloat64(Shift):
    """In float64, rounded once."""

    def shifted(self, sigmas, shift):
        return super().shifted(sigmas.double(), shift)


@right()
class AsInThePaper(Shift):
    """shift sigma / (1 + (shift - 1) sigma)."""

    def shifted(self, sigmas, shift):
        return shift * sigmas / (1 + (shift - 1) * sigmas)


@right()
class OddsBackToShares(Shift):
    """Of the complement, in float64: 1 - (1 - sigma) / (1 - sigma + shift sigma)."""

    def shifted(self, sigmas, shift):
        sigmas = sigmas.double()
        return 1 - (1 - sigmas) / (1 - sigmas + shift * sigmas)
