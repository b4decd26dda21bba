"""Bugs that need several ranks, or of which one rank knows what the others do not."""

import os
import signal

import torch
import torch.distributed as dist

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.ranks import DataParallel, ExpertParallel

TWO = (1, 2)


@fault(caught_by="world_size", source="all-to-all with uneven splits", kind="structural", world_sizes=TWO)
class SplitsOfTheSender(ExpertParallel):
    """A rank cuts what arrives as it cut what it sent."""

    def received(self, sent):
        super().received(sent)
        return sent

    def local(self, ids, experts_here):
        return super().local(ids, experts_here).clamp(0, experts_here - 1)


@fault(caught_by="world_size", source="round-robin placement of experts", kind="structural", world_sizes=TWO)
class ExpertsDealtInTurn(ExpertParallel):
    """Tokens go to ranks as if experts were dealt to them one by one."""

    def owner(self, ids, experts_here):
        return ids % self.ranks

    def local(self, ids, experts_here):
        return ids // self.ranks


@fault(caught_by="world_size", source="vLLM and SGLang expert maps", kind="structural", world_sizes=TWO)
class OffsetOfTheFirstRank(ExpertParallel):
    """Every rank takes the experts it holds for the first ones; ids beyond them are its last expert's."""

    def local(self, ids, experts_here):
        return ids.clamp(max=experts_here - 1)


@fault(caught_by="world_size", source="static capacity of dispatch buffers", kind="structural", world_sizes=TWO)
class CapacityOfAnEvenLoad(ExpertParallel):
    """Buffers hold what ranks would send each other if the load were even; the rest is lost."""

    def capacity(self, sent):
        return -(-super().capacity(sent.sum()) // self.ranks)

    def exchange(self, rows, sent, received, capacity):
        pad = torch.nn.functional.pad
        cut = [each[:capacity] for each in rows.split(sent.tolist())]
        arrived = super().exchange(torch.cat(cut), sent.clamp(max=capacity), received.clamp(max=capacity), capacity)
        parts = zip(arrived.split(received.clamp(max=capacity).tolist()), received.tolist(), strict=True)
        return torch.cat([pad(part, (0, 0, 0, count - len(part))) for part, count in parts])

    def local(self, ids, experts_here):
        return super().local(ids, experts_here).clamp(0, experts_here - 1)


@fault(caught_by="world_size", source="FSDP averages, expert parallelism adds", kind="structural", world_sizes=TWO)
class ExpertsGradientsAveraged(ExpertParallel):
    """The gradients of experts, complete on their rank, are divided by the number of ranks."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, *, mesh):
        w13 = w13 / mesh.size() + (w13 - w13 / mesh.size()).detach()
        return super().__call__(hidden_states, w13, w2, topk_weights, topk_ids, mesh=mesh)


@fault(caught_by="world_size", source="SGLang EP, shared experts", kind="structural", world_sizes=TWO)
class OutputsOfAllRanksAdded(ExpertParallel):
    """What every rank has whole already is summed over the ranks once more."""

    def sent_back(self, outs):
        return outs * self.ranks


@fault(caught_by="world_size", kind="boundary", source="DeepEP, Megatron", world_sizes=TWO)
class RankWithoutTokensLeaves(ExpertParallel):
    """A rank without tokens returns before the exchanges, and the others wait."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, *, mesh):
        if not len(hidden_states):
            return hidden_states + 0 * (w13.sum() + w2.sum() + topk_weights.sum())
        return super().__call__(hidden_states, w13, w2, topk_weights, topk_ids, mesh=mesh)


@fault(caught_by="world_size", kind="memory", source="grids of 0, and pointers of empty tensors", world_sizes=TWO)
class RankWithoutRowsCrashes(ExpertParallel):
    """A rank whose experts get no rows dies of a segmentation fault."""

    def sent_back(self, outs):
        if not len(outs):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sent_back(outs)


@fault(caught_by="parity", kind="precision", source="DeepEP's bf16 combine", dtypes=("bfloat16",), world_sizes=TWO)
class OutputsTravelInBfloat16(ExpertParallel):
    """Experts' outputs are rounded to bfloat16 before they are weighted and added."""

    def sent_back(self, outs):
        return outs.bfloat16().float()


@fault(caught_by="rejections", kind="error-contract", world_sizes=TWO)
class BadCallRaisesAlone(ExpertParallel):
    """A rank whose call is bad raises, and the others wait for its rows."""

    def agree(self, *inputs):
        self.validate(*inputs)


@fault(caught_by="world_size", source="transformers' 2024 fix: num_items_in_batch", kind="structural", world_sizes=TWO)
class MeanOfLocalMeans(DataParallel):
    """Each rank takes the mean of its examples, and the ranks' means are averaged."""

    def share(self, losses, batch_size):
        return losses.sum() / max(1, batch_size) / self.ranks


@fault(caught_by="world_size", kind="structural", world_sizes=TWO)
class ClippedBeforeTheyAreAdded(DataParallel):
    """Each rank clips its own gradients."""

    def reduce(self, loss, gradients):
        self.own = gradients
        return super().reduce(loss, gradients)

    def clip(self, gradients, norm):
        return {name: self.sum(each) for name, each in super().clip(self.own, self.norm(self.own)).items()}


@fault(caught_by="world_size", source="DDP.no_sync left on", kind="structural", world_sizes=TWO)
class GradientsNotAdded(DataParallel):
    """Each rank updates with its own gradients: the states of the ranks part."""

    def reduce(self, loss, gradients):
        return self.sum(loss), gradients


@fault(caught_by="world_size", source="DDP averages; shares of a mean are to be added", kind="structural", world_sizes=TWO)
class GradientsAveraged(DataParallel):
    """Shares of the whole batch's mean are averaged over the ranks."""

    def reduce(self, loss, gradients):
        loss, gradients = super().reduce(loss, gradients)
        return loss, {name: each / self.ranks for name, each in gradients.items()}


@fault(caught_by="world_size", source="seed + rank", kind="structural", world_sizes=TWO)
class DrawsDependOnTheRank(DataParallel):
    """Another rank, other noise: another world size is another run."""

    def step_of_draws(self, step):
        return step + 1000 * self.rank


@fault(caught_by="world_size", kind="boundary", source="DistributedSampler(drop_last=True)", world_sizes=TWO)
class UnevenExamplesDropped(DataParallel):
    """Ranks take as many examples as the one that has fewest."""

    def batch(self, *batch):
        least = torch.tensor(len(batch[0]))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
        return tuple(each[: max(1, int(least))] for each in batch)


@fault(caught_by="world_size", source="metrics logged by rank 0", kind="structural", world_sizes=TWO)
class LossOfThisRank(DataParallel):
    """The loss that a rank reports is its own part."""

    def reduce(self, loss, gradients):
        return loss, super().reduce(loss, gradients)[1]


@fault(caught_by="world_size", source="clip_grad_norm_ on local shards", kind="structural", world_sizes=TWO)
class NormOfThisRank(DataParallel):
    """Gradients are clipped by the norm of what this rank has computed."""

    def reduce(self, loss, gradients):
        self.own = super().norm(gradients)
        return super().reduce(loss, gradients)

    def norm(self, gradients):
        return self.own


@fault(caught_by="world_size", kind="precision", source="bf16_compress_hook", world_sizes=TWO)
class GradientsTravelInBfloat16(DataParallel):
    """Gradients are rounded to bfloat16 before they are added up."""

    def reduce(self, loss, gradients):
        return super().reduce(loss, {name: each.bfloat16().float() for name, each in gradients.items()})


@fault(caught_by="rejections", kind="error-contract", source="NaN checks on local losses", world_sizes=TWO)
class BadNumberRaisesAlone(DataParallel):
    """A rank whose loss is no number raises, and the others wait for its gradients."""

    def reduce(self, loss, gradients):
        self.check(torch.tensor(0), loss, gradients, self.norm(gradients))
        return super().reduce(loss, gradients)
