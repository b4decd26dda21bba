"""Right but different steps of samplers."""

import torch

from gaugeblock.conformance.selftest.simulated.sampler_steps import Ddim, Ddpm, Edm, Euler, Flow, Heun
from gaugeblock.conformance.selftest.variant import right


def of_numbers(case):
    """Not where infinities cancel in one formula and not in the other."""
    return case.regime != "special"


def wide(*arrays):
    """In float64."""
    return [each.double() for each in arrays]


@right()
class MeanInFloat64(Ddpm):
    """The mean in float64."""

    def mean(self, data, x, a, previous, beta):
        return super().mean(*wide(data, x, a, previous, beta)).float()


@right(fits=of_numbers)
class PosteriorOfDdim(Ddpm):
    """The mean by DDIM's formula: the data, and the noise that they leave, as far as the posterior's variance leaves it."""

    def mean(self, data, x, a, previous, beta):
        data, x, a, previous = wide(data, x, a, previous)
        kept = (1 - previous) * (a * (1 - previous) / (previous * (1 - a))).clamp(min=0)
        return (previous.sqrt() * data + kept.sqrt() * (x - a.sqrt() * data) / (1 - a).sqrt()).float()


@right()
class PowersOfVariances(Ddpm):
    """The learned variance as a product of powers."""

    def learned(self, posterior, beta, share):
        return torch.pow(beta, share / 2) * torch.pow(posterior, (1 - share) / 2)


@right()
class StepInFloat64(Ddim):
    """Everything behind the prediction in float64, the direction's share as the paper writes it."""

    def step(self, data, epsilon, z, a, previous, eta):
        data, epsilon, z, a, previous = wide(data, epsilon, z, a, previous)
        deviation = eta * self.deviation(a, previous)
        direction = (1 - previous - deviation**2).clamp(min=0).sqrt() * epsilon
        return (previous.sqrt() * data + direction + deviation * z).float()


@right()
class EveryShareOnce(Ddim):
    """1 - p is taken out of both roots."""

    def step(self, data, epsilon, z, a, previous, eta):
        renewed = eta * eta * (previous - a) / (previous * (1 - a))
        kept = (1 - eta * eta) + eta * eta * a * (1 - previous) / (previous * (1 - a))
        root = (1 - previous).sqrt()
        return previous.sqrt() * data + root * (kept.sqrt() * epsilon + renewed.clamp(min=0).sqrt() * z)


@right(fits=of_numbers)
class RatioOfSigmas(Euler):
    """Data and example are mixed by the ratio of the sigmas."""

    def follow(self, x, data, sigma, higher, after):
        x, data, higher, after = wide(x, data, higher, after)
        return (after / higher * x + (1 - after / higher) * data).float()


@right()
class SlopeInFloat64(Euler):
    """In float64, rounded once."""

    def follow(self, x, data, sigma, higher, after):
        return super().follow(*wide(x, data, sigma, higher, after)).float()


@right()
class VelocityFirst(Euler):
    """Data of v over one denominator."""

    def data(self, x, p, sigma, higher, prediction_type):
        if prediction_type != "v_prediction":
            return super().data(x, p, sigma, higher, prediction_type)
        return (x - sigma * torch.sqrt(1 + sigma * sigma) * p) / (1 + sigma * sigma)


@right()
class SlopesInFloat64(Heun):
    """In float64, rounded once."""

    def first(self, x, p, sigma, config):
        x, p, sigma = wide(x, p, sigma)
        return super().first(x, p, sigma, config)

    def follow(self, x, euler, first, second, sigma, after):
        x, euler, sigma, after = wide(x, euler, sigma, after)
        return super().follow(x, euler, first, second, sigma, after).float()


@right()
class HalfOfEach(Heun):
    """Half a step along each slope."""

    def follow(self, x, euler, first, second, sigma, after):
        half = 0.5 * (after - sigma)
        return x + half * first + half * second


@right()
class HalfTheEulerStep(Heun):
    """The mean of the point that the first slope leads to, and of the one that the second leads to."""

    def follow(self, x, euler, first, second, sigma, after):
        step = after - sigma
        return ((x + step * first) + (x + step * second)) / 2


@right()
class ScaledInFloat64(Edm):
    """Scales in float64."""

    def scaled(self, x, p, sigma, higher, config):
        x, p, sigma, higher = wide(x, p, sigma, higher)
        return super().scaled(x, p, sigma, higher, config).float()


@right()
class HypotenuseOfSigmas(Edm):
    """sqrt(sigma**2 + sigma_data**2) by hypot."""

    def scaled(self, x, p, sigma, higher, config):
        both = torch.hypot(higher, torch.full_like(higher, config.sigma_data))
        small, large = config.sigma_data / both, higher / both
        sign = 1 if config.prediction_type == "epsilon" else -1
        return small * small * x + sign * config.sigma_data * large * p


@right()
class FlowInFloat64(Flow):
    """In float64, rounded once."""

    def follow(self, x, v, z, sigma, after):
        return super().follow(*wide(x, v, z, sigma, after)).float()

    def anew(self, x, v, z, sigma, after):
        return super().anew(*wide(x, v, z, sigma, after)).float()


@right()
class FusedMultiplyAdds(Flow):
    """By addcmul."""

    def follow(self, x, v, z, sigma, after):
        return torch.addcmul(x, after - sigma, v)

    def anew(self, x, v, z, sigma, after):
        # not by lerp, which makes NaN of an infinity: it takes the start from the end first
        return torch.addcmul(after * z, 1 - after, torch.addcmul(x, -sigma, v))
