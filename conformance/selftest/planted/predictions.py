"""Bugs of predictions and of the weights of their losses."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.predictions import AddNoise, Convert, MinSnr, Target


@fault(caught_by="parity", kind="structural", source="noise of the wrong variance: sigma for its square")
class VariancesForRoots(AddNoise):
    """Data and noise are weighted by variances, not by their roots."""

    def mix(self, data, noise, alphas, sigmas):
        return alphas**2 * data + sigmas**2 * noise


@fault(caught_by="parity", kind="precision", source="diffusers add_noise, whose alphas_cumprod are cast to the sample's dtype",
       dtypes=("bfloat16",))  # fmt: skip
class RatesRounded(AddNoise):
    """Rates are rounded to bfloat16."""

    def mix(self, data, noise, alphas, sigmas):
        return super().mix(data, noise, alphas.bfloat16().float(), sigmas.bfloat16().float())


@fault(caught_by="parity", kind="structural", smallest=2)
class OneRateForTheBatch(AddNoise):
    """All examples get as much noise as the first."""

    def mix(self, data, noise, alphas, sigmas):
        return super().mix(data, noise, alphas[:1], sigmas[:1])


@fault(caught_by="parity", kind="structural", source="v-prediction with the sign of DDIM's angle exchanged")
class VelocityNegated(Target):
    """v points from noise to data."""

    def v(self, data, noise, alphas, sigmas):
        return -super().v(data, noise, alphas, sigmas)


@fault(caught_by="parity", kind="structural", source="velocity of flows used for v-prediction")
class VelocityOfFlows(Target):
    """v-prediction is taken for noise − data."""

    def v(self, data, noise, alphas, sigmas):
        return noise - data


@fault(caught_by="parity", kind="structural", source="diffusers train_text_to_image_sdxl.py, prediction_type sample")
class NoiseSubtractedFromSample(Target):
    """Of "sample" the noise is subtracted."""

    def target(self, data, noise, alphas, sigmas, prediction_type):
        found = super().target(data, noise, alphas, sigmas, prediction_type)
        return found - noise if prediction_type == "sample" else found


@fault(caught_by="parity", kind="structural", source="v-prediction ports: plus for minus")
class PlusInData(Convert):
    """Data of v: both shares are added."""

    def solve(self, p, x, alphas, sigmas, prediction_type):
        data, noise = super().solve(p, x, alphas, sigmas, prediction_type)
        return (alphas * x + sigmas * p if prediction_type == "v_prediction" else data), noise


@fault(caught_by="parity", kind="structural", source="conversion written for flows, used for variance preserving models")
class RatesAddedUpToOne(Convert):
    """Flows are solved as if alpha + sigma were 1."""

    def solve(self, p, x, alphas, sigmas, prediction_type):
        if prediction_type != "flow_prediction":
            return super().solve(p, x, alphas, sigmas, prediction_type)
        return x - sigmas * p, x + alphas * p


@fault(caught_by="parity", kind="boundary", source="clamped divisors against SNR 0")
class DivisorClamped(Convert):
    """Nothing is divided by less than 0.01."""

    def solve(self, p, x, alphas, sigmas, prediction_type):
        if prediction_type == "epsilon":
            return (x - sigmas * p) / alphas.clamp(min=1e-2), p
        return super().solve(p, x, alphas, sigmas, prediction_type)


@fault(caught_by="rejections", kind="error-contract", source="data from a predicted noise at zero terminal SNR")
class NoiseAskedForData(Convert):
    """Where there are no data in an example, its predicted noise is divided by 0."""

    def __call__(self, prediction, noised, alphas, sigmas, **how):
        return super().__call__(prediction, noised, alphas.clamp(min=1e-8), sigmas.clamp(min=1e-8), **how)


@fault(caught_by="parity", kind="structural", source="diffusers#5654: min-SNR of epsilon for v-prediction", dtypes=("float32",))
class WeightOfEpsilonForV(MinSnr):
    """v is weighted as noise is."""

    def weights(self, snr, prediction_type, gamma):
        return super().weights(snr, "epsilon" if prediction_type == "v_prediction" else prediction_type, gamma)


@fault(caught_by="parity", kind="structural", source="diffusers train_dreambooth_lora_sdxl.py: + 1 behind the quotient",
       dtypes=("float32",))  # fmt: skip
class OneAddedToTheWeight(MinSnr):
    """Of v, 1 is added to the weight instead of the ratio."""

    def weights(self, snr, prediction_type, gamma):
        if prediction_type != "v_prediction":
            return super().weights(snr, prediction_type, gamma)
        return super().weights(snr, "epsilon", gamma) + 1


@fault(caught_by="parity", kind="boundary", source="diffusers#8466: min-SNR at zero terminal SNR", dtypes=("float32",))
class NothingOverNothing(MinSnr):
    """min(snr, gamma) / snr, which is NaN where snr is 0."""

    def weights(self, snr, prediction_type, gamma):
        if prediction_type != "epsilon":
            return super().weights(snr, prediction_type, gamma)
        return torch.minimum(snr, torch.full_like(snr, gamma)) / snr


@fault(caught_by="parity", kind="structural", source="max for min in a weight", dtypes=("float32",))
class MaxSnr(MinSnr):
    """The larger of snr and gamma."""

    def weights(self, snr, prediction_type, gamma):
        return snr.clamp(min=gamma) if prediction_type == "sample" else super().weights(snr, prediction_type, gamma)
