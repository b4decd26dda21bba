"""Right but different predictions."""

import torch

from gaugeblock.conformance.selftest.simulated.predictions import AddNoise, Convert, MinSnr, Target
from gaugeblock.conformance.selftest.variant import right


@right()
class NoisedInFloat64(AddNoise):
    """Everything in float64, rounded once."""

    def mix(self, data, noise, alphas, sigmas):
        return super().mix(data.double(), noise.double(), alphas.double(), sigmas.double())


@right()
class NoiseFirst(AddNoise):
    """The noise's share first, by one fused multiply-add."""

    def mix(self, data, noise, alphas, sigmas):
        return torch.addcmul(sigmas * noise, alphas, data)


@right()
class TargetInFloat64(Target):
    """In float64, rounded once."""

    def target(self, data, noise, alphas, sigmas, prediction_type):
        return super().target(data.double(), noise.double(), alphas.double(), sigmas.double(), prediction_type)


@right()
class VelocityOfDataFirst(Target):
    """The data's share first, by one fused multiply-add."""

    def v(self, data, noise, alphas, sigmas):
        return torch.addcmul(-sigmas * data, alphas, noise)


@right()
class SolvedInFloat64(Convert):
    """In float64, rounded once."""

    def solve(self, p, x, alphas, sigmas, prediction_type):
        return super().solve(p.double(), x.double(), alphas.double(), sigmas.double(), prediction_type)


@right()
class SharesPerExample(Convert):
    """How much of both there is in the result is found once per example."""

    def __call__(self, prediction, noised, alphas, sigmas, *, prediction_type, to):
        super().__call__(prediction, noised, alphas, sigmas, prediction_type=prediction_type, to=to)  # which validates
        ones, zeros = torch.ones_like(alphas), torch.zeros_like(alphas)
        of = {
            "epsilon": (ones, zeros), "sample": (zeros, ones), "v_prediction": (alphas, -sigmas), "flow_prediction": (ones, -ones)
        }  # fmt: skip
        (n, d), (to_n, to_d) = of[prediction_type], of[to]
        determinant = alphas * n - sigmas * d
        if prediction_type == to:
            determinant = ones  # which may be 0, and is not needed
            of_p, of_x = ones, zeros
        else:
            of_p, of_x = (alphas * to_n - sigmas * to_d) / determinant, (n * to_d - to_n * d) / determinant
        return (of_p.view(-1, 1, 1) * prediction.float() + of_x.view(-1, 1, 1) * noised.float()).to(prediction.dtype)


@right(dtypes=("float32",))
class OfTheFraction(MinSnr):
    """By the share of the data, snr / (snr + 1), and in float64."""

    def weights(self, snr, prediction_type, gamma):
        snr = snr.double()
        shares = torch.where(snr.isinf(), torch.zeros_like(snr), 1 / (snr + 1))
        if prediction_type == "v_prediction":
            return (snr.clamp(max=gamma) * shares).float()
        return super().weights(snr, prediction_type, gamma).float()


@right(dtypes=("float32",))
class WeightsOfSnrInFloat64(MinSnr):
    """In float64, rounded once."""

    def weights(self, snr, prediction_type, gamma):
        return super().weights(snr.double(), prediction_type, gamma).float()
