"""Bugs of experts in slices, and of tokens that travel between ranks."""

from typing import Any

import torch
import torch.distributed as dist

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.ranks import ExpertParallel, Transpose
from gaugeblock.conformance.selftest.simulated.tensor_parallel import TensorParallel, TensorParallelMlp

SLICES: dict[str, Any] = {"world_sizes": (1, 2), "sharding": "tensor_parallel"}


@fault(caught_by="world_size", source="row-parallel linears with a bias", kind="structural", **SLICES)
class LastBiasesOfEveryRank(TensorParallelMlp):
    """Every rank adds the last biases, and the ranks' sum has them as often."""

    def last_biases(self, biases):
        return biases


@fault(caught_by="world_size", source="vLLM and SGLang loaders", kind="structural", **SLICES)
class GateAndUpSplitAsOneBlock(TensorParallel):
    """The rows of w13 are split once, instead of gate and up each: the first rank has gates alone."""

    def rows(self, w13):
        of_ranks = [torch.empty_like(w13, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(of_ranks, w13.detach().contiguous(), group=self.group)
        halves = zip(*(each.chunk(2, 1) for each in of_ranks), strict=True)
        block = torch.cat([each for half in halves for each in half], 1).tensor_split(self.ranks, 1)[self.rank]
        return w13 + (block - w13).detach()


@fault(caught_by="parity", source="Diffulex's all-reduce of bf16", kind="precision", dtypes=("bfloat16",), **SLICES)
class PartsRoundedBeforeTheyAreAdded(TensorParallel):
    """Ranks' parts are rounded to bfloat16, and then added up."""

    def total(self, part):
        return super().total(part.bfloat16().float())


@fault(caught_by="world_size", source="Megatron's f left out", kind="gradient", **SLICES)
class GradientsOfTokensNotAdded(TensorParallel):
    """Each rank returns the gradients of tokens that its slices give."""

    def whole(self, tensor):
        return tensor.float()


@fault(caught_by="world_size", source="autograd through all_reduce", kind="gradient", **SLICES)
class GradientsAddedTwice(TensorParallel):
    """The sum's own gradient is added up over the ranks, which all have it already."""

    def total(self, part):
        return super().total(self.whole(part))


@fault(caught_by="world_size", source="drop_last in sequence-parallel scatters", kind="boundary", world_sizes=(1, 2))
class UnevenTokensDropped(ExpertParallel):
    """Ranks send as many tokens as the one that has fewest; the rest get nothing."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids, *, mesh):
        least = torch.tensor(len(hidden_states))
        dist.all_reduce(least, dist.ReduceOp.MIN, group=mesh.get_group())
        sent = (each[: int(least)] for each in (topk_weights, topk_ids))
        out = super().__call__(hidden_states[: int(least)], w13, w2, *sent, mesh=mesh)
        return torch.cat([out, 0 * hidden_states[int(least) :] * topk_weights[int(least) :].sum()])


@fault(caught_by="world_size", source="buffers read in the order of arrival", kind="structural", world_sizes=(1, 2))
class SendersInAnotherOrder(ExpertParallel):
    """What came from the last rank is taken for the first one's."""

    def exchange(self, rows, sent, received, capacity):
        pad = torch.nn.functional.pad
        blocks = torch.stack([pad(each, (0, 0, 0, capacity - len(each))) for each in rows.split(sent.tolist())])
        arrived = Transpose.apply(blocks, self.group).flip(0)
        return torch.cat([block[:count] for block, count in zip(arrived, received.tolist(), strict=True)])

    def local(self, ids, experts_here):
        return super().local(ids, experts_here).clamp(0, experts_here - 1)
