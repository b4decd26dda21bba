"""Right but different implementations on several ranks."""

import torch
import torch.distributed as dist

from gaugeblock.conformance.selftest.simulated.ranks import DataParallel
from gaugeblock.conformance.selftest.variant import right


@right(dtypes=("float32",), world_sizes=(2,))
class AveragingDataParallel(DataParallel):
    """As DDP: what ranks exchange are averages, so shares are multiplied by the number of ranks before."""

    def share(self, losses, batch_size):
        return self.ranks * super().share(losses, batch_size)

    def reduce(self, loss, gradients):
        loss, gradients = super().reduce(loss, gradients)
        return loss / self.ranks, {name: each / self.ranks for name, each in gradients.items()}


@right(dtypes=("float32",), world_sizes=(2,))
class OneBucketForAllGradients(DataParallel):
    """Gradients travel in one flat buffer, and are added up by every rank itself, from the last rank to the first."""

    def reduce(self, loss, gradients):
        flat = torch.cat([loss[None], *(each.flatten() for each in gradients.values())])
        of_ranks = [torch.empty_like(flat) for _ in range(self.ranks)]
        dist.all_gather(of_ranks, flat, group=self.group)
        total = sum(of_ranks[-2::-1], of_ranks[-1])
        parts = total[1:].split([each.numel() for each in gradients.values()])
        return total[0], {name: part.view(gradients[name].shape) for name, part in zip(gradients, parts, strict=True)}
