"""Right but different trainers of text-latent diffusion with cycles."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.simulated.train_cycle_vae import CycleTrainer
from gaugeblock.conformance.selftest.variant import right


@right(dtypes=("float32",))
class TextByText(CycleTrainer):
    """Every example is a microbatch, from the last to the first."""

    def microbatches(self, batch_size):
        return list(torch.arange(batch_size).flip(0).split(1))


@right(dtypes=("float32",))
class LossesOfTorch(CycleTrainer):
    """torch's normalize and cross_entropy."""

    def direction(self, latents):
        return functional.normalize(latents, dim=-1, eps=1e-8)

    def entropy(self, logits, ids):
        return functional.cross_entropy(logits.mT, ids, reduction="none").mean(1)


@right(dtypes=("float32",))
class TableByLogarithms(CycleTrainer):
    """What remains of a latent is the exponential of a sum of logarithms."""

    def remaining(self):
        return torch.log1p(-self.betas().clamp(1e-4, 0.9999)).cumsum(0).exp()
