"""Bugs of routers that choose by noisy logits."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.noisy_routers import NoisyRouter, SteRouter


@fault(caught_by="parity", kind="structural", source="ports of arXiv:1701.06538")
class DeviationIsItsLogit(NoisyRouter):
    """The noise is multiplied by what softplus should have been taken of."""

    def deviation(self, noise_logits):
        return noise_logits


@fault(caught_by="parity", kind="structural", source="ports of arXiv:1701.06538")
class ChosenWithoutNoise(NoisyRouter):
    """Noise changes the weights, and not who is chosen."""

    def chosen_by(self, noisy, logits):
        return logits.float()


@fault(caught_by="parity", kind="structural", source="ports of arXiv:1701.06538")
class WeighedWithoutNoise(NoisyRouter):
    """Noise changes who is chosen, and not the weights."""

    def noisy(self, logits, deviation, noise):
        self.clean = logits
        return super().noisy(logits, deviation, noise)

    def weigh_chosen(self, noisy, ids):
        return super().weigh_chosen(self.clean + 0 * noisy.nan_to_num(), ids)


@fault(caught_by="parity", kind="structural", source="ports of arXiv:1701.06538")
class SoftmaxBeforeTheChoice(NoisyRouter):
    """The softmax is taken over all experts, so that the weights do not sum to 1."""

    def weigh_chosen(self, noisy, ids):
        return self.scores(noisy).gather(1, ids)


@fault(caught_by="parity", kind="precision", source="log of 1 + exp")
class SoftplusOverflows(NoisyRouter):
    """ln(1 + e^x) is infinite for x above 88."""

    def deviation(self, noise_logits):
        return noise_logits.exp().log1p()

    def noisy(self, logits, deviation, noise):
        return super().noisy(logits, deviation.clamp(max=10), noise)


@fault(caught_by="parity", kind="precision", source="log of 1 + exp")
class SoftplusOfFewDigits(NoisyRouter):
    """Beside 1, an exponential loses its digits: small deviations become 0."""

    def deviation(self, noise_logits):
        return noise_logits.clamp(min=0) + (1 + (-noise_logits.abs()).exp()).log()


@fault(caught_by="gradients", kind="gradient", source="ports of arXiv:1701.06538")
class DeviationIsNotLearned(NoisyRouter):
    """No gradient reaches the logits of the noise but zeros."""

    def deviation(self, noise_logits):
        return super().deviation(noise_logits).detach() + 0 * noise_logits


@fault(caught_by="parity", kind="precision", source="bfloat16 noise")
class NoiseInBfloat16(NoisyRouter):
    """The draw is rounded to bfloat16."""

    def noisy(self, logits, deviation, noise):
        return super().noisy(logits, deviation, noise.bfloat16().float())


@fault(caught_by="parity", kind="structural", source="sumitdotml/moe-emergence review", smallest=2)
class NoiseOutsideOfTraining(SteRouter):
    """Noise is still on in evaluation."""

    def noisy(self, logits, noise, noise_std, training):
        return super().noisy(logits, noise, noise_std, True)


@fault(caught_by="parity", kind="structural", source="sumitdotml/moe-emergence review", smallest=2)
class NoiseForgotten(SteRouter):
    """Noise is off although it is asked for."""

    def noisy(self, logits, noise, noise_std, training):
        return logits


@fault(caught_by="parity", kind="structural", source="sumitdotml/moe-emergence review", smallest=2)
class EntropyOfNoisyProbabilities(SteRouter):
    """The entropy is that of the noisy probabilities."""

    def entropy(self, clean, probs):
        return super().entropy(probs, clean)


@fault(caught_by="parity", kind="structural")
class NoisyForClean(SteRouter):
    """The two kinds of probabilities are returned in each other's place."""

    def returned(self, weights, ids, probs, clean, logits, entropy):
        return weights, ids, clean, probs, logits, entropy


@fault(caught_by="parity", kind="structural")
class NoisyLogitsReturned(SteRouter):
    """The logits that are returned hold the noise."""

    def noisy(self, logits, noise, noise_std, training):
        self.noisy_logits = super().noisy(logits, noise, noise_std, training)
        return self.noisy_logits

    def returned(self, weights, ids, probs, clean, logits, entropy):
        return weights, ids, probs, clean, self.noisy_logits, entropy


@fault(caught_by="parity", kind="structural", source="ports of sumitdotml/moe-emergence")
class WeightIsTheProbability(SteRouter):
    """The weight of one expert alone is its probability, not 1."""

    def alone(self, chosen, training):
        return chosen if training else super().alone(chosen, training)


@fault(caught_by="gradients", kind="gradient", source="sumitdotml/moe-emergence")
class StraightThroughIsLost(SteRouter):
    """The weight of one expert alone is a constant."""

    def alone(self, chosen, training):
        return torch.ones_like(chosen)


@fault(caught_by="gradients", kind="gradient", source="sumitdotml/moe-emergence")
class StraightThroughOutsideOfTraining(SteRouter):
    """The weight of one expert alone has a gradient in evaluation."""

    def alone(self, chosen, training):
        return super().alone(chosen, True)


@fault(caught_by="gradients", kind="gradient", source="ports of sumitdotml/moe-emergence")
class SharesAreConstants(SteRouter):
    """Of several experts, what their probabilities are divided by has no gradient."""

    def shared(self, chosen):
        return chosen / (self.sum(chosen) + self.epsilon).detach()


@fault(caught_by="gradients", kind="gradient", source="metrics under no_grad")
class LogitsWithoutGradient(SteRouter):
    """The logits that are returned are detached, so that a z-loss of them changes nothing."""

    def returned(self, weights, ids, probs, clean, logits, entropy):
        return weights, ids, probs, clean, logits.detach(), entropy


@fault(caught_by="parity", kind="precision", source="sumitdotml/moe-emergence in float16")
class EntropyWithoutItsConstant(SteRouter):
    """In float16 the constant beside a probability is 0, and where that is 0 too the entropy is NaN."""

    def entropy(self, clean, probs):
        return -self.sum(clean * (clean + clean.new_tensor(1e-9).half().float()).log())[:, 0]


@fault(caught_by="parity", kind="structural", source="entropy in bits")
class EntropyInBits(SteRouter):
    """The logarithm is that of base 2."""

    def entropy(self, clean, probs):
        return super().entropy(clean, probs) / 0.6931471805599453
