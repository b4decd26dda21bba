"""Right but different objectives."""

import torch

from gaugeblock.conformance.selftest.simulated.objectives import FlowLoss, FlowMinSnr, Interpolate, Velocity
from gaugeblock.conformance.selftest.variant import right


@right()
class MixInFloat64(Interpolate):
    """Everything in float64, rounded once."""

    def mix(self, data, noise, times):
        return super().mix(data.double(), noise.double(), times.double())


@right()
class SharesAdded(Interpolate):
    """The noise's share first, by one fused multiply-add."""

    def mix(self, data, noise, times):
        return torch.addcmul(times * noise, 1 - times, data)


@right()
class Negated(Velocity):
    """One difference, and its sign."""

    def difference(self, data, noise, velocity):
        return (1 if velocity == "noise - data" else -1) * (noise - data)


@right()
class DifferenceInFloat64(Velocity):
    """In float64, rounded once."""

    def difference(self, data, noise, velocity):
        return super().difference(data.double(), noise.double(), velocity)


@right()
class MeanOfTorch(FlowLoss):
    """torch's mean of products in float32."""

    def mean(self, errors):
        return (errors * errors).flatten(1).mean(1)


@right()
class ValueByValue(FlowLoss):
    """Squares are added one after the other, from the last to the first."""

    def mean(self, errors):
        squares = errors.square().flatten(1)
        total = torch.zeros(len(errors))
        for each in squares.flip(1).unbind(1):
            total = total + each
        return total / squares.shape[1]


@right()
class DotProducts(FlowLoss):
    """A product of each example with itself."""

    def mean(self, errors):
        flat = errors.flatten(1)
        return torch.einsum("bn,bn->b", flat, flat) / flat.shape[1]


@right(dtypes=("float32",))
class WeightsInFloat64(FlowMinSnr):
    """In float64, rounded once."""

    def consistent(self, data, noise, prediction_type, gamma):
        noise = noise.double()
        return super().consistent(1 - noise, noise, prediction_type, gamma).float()


@right(dtypes=("float32",))
class OneDivision(FlowMinSnr):
    """The coded weight as gamma (1 - t)**2 / t**2."""

    def coded(self, data, noise, gamma):
        found = gamma * data.clamp(min=1e-8).square() / noise.square()
        return torch.minimum(found, torch.ones_like(found))
