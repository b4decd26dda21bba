"""Right but different trainers of Stable Diffusion."""

import torch

from gaugeblock.conformance.selftest.simulated.train_stable_diffusion import StableTrainer
from gaugeblock.conformance.selftest.variant import right


@right(dtypes=("float32",))
class CaptionByCaption(StableTrainer):
    """Every example is a microbatch, from the last to the first, and every caption is encoded by itself."""

    def microbatches(self, batch_size):
        return list(torch.arange(batch_size).flip(0).split(1))


@right(dtypes=("float32",))
class WeightsAsRoots(StableTrainer):
    """Errors are weighted before they are squared."""

    def weighted(self, losses, weights):
        return (losses.sqrt() * weights.sqrt()).square()


@right(dtypes=("float32",))
class TablesByLogarithms(StableTrainer):
    """What remains of the data is the exponential of a sum of logarithms."""

    def remaining(self):
        schedule = self.config.schedule
        betas = self.betas(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)
        remaining = torch.log1p(-betas).cumsum(0).exp()
        return self.rescaled(remaining) if schedule.rescale_betas_zero_snr else remaining
