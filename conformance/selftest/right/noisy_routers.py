"""Right ways to write routers that choose by noisy logits."""

import torch

from gaugeblock.conformance.selftest.simulated.noisy_routers import NoisyRouter, SteRouter
from gaugeblock.conformance.selftest.variant import right


@right(batch_invariant=False)
class SoftplusOfTorch(NoisyRouter):
    """torch's softplus, which is the identity above 20, and its top-k."""

    def deviation(self, noise_logits):
        return torch.nn.functional.softplus(noise_logits)

    def select(self, scores, top_k):
        return scores.topk(top_k).indices


@right(batch_invariant=False)
class SoftplusOfLogaddexp(NoisyRouter):
    """ln(e^x + e^0)."""

    def deviation(self, noise_logits):
        return torch.logaddexp(noise_logits, torch.zeros_like(noise_logits))


@right()
class ShareOfAll(NoisyRouter):
    """The softmax over all experts, -inf but for the chosen, as the paper has it."""

    def weigh_chosen(self, noisy, ids):
        chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter(1, ids, True)
        return self.scores(noisy.masked_fill(~chosen, -torch.inf)).gather(1, ids)


@right()
class DifferenceStraightThrough(SteRouter):
    """The weight of one alone is the probability, less what it has more than 1."""

    def alone(self, chosen, training):
        return chosen - (chosen - 1).detach() if training else super().alone(chosen, training)


@right()
class ChosenByNoisyLogits(SteRouter):
    """Experts are chosen before the softmax."""

    def noisy(self, logits, noise, noise_std, training):
        self.logits = super().noisy(logits, noise, noise_std, training)
        return self.logits

    def chosen_by(self, probs, clean):
        return self.logits.masked_fill(self.logits == -torch.inf, -3e38)


@right()
class LogitsScaledBack(SteRouter):
    """Noise is added in units of its own deviation where there is any."""

    def noisy(self, logits, noise, noise_std, training):
        return torch.add(logits, noise, alpha=noise_std if training else 0.0)
