"""Right but different routers."""

import functools

import torch

from gaugeblock.conformance.selftest.simulated.routers import GroupedRouter, SoftmaxRouter
from gaugeblock.conformance.selftest.variant import LOG2_E, right


@right()
class SoftmaxOfTorch(SoftmaxRouter):
    """torch's softmax and top-k."""

    def scores(self, logits):
        return logits.softmax(1)

    def select(self, scores, top_k):
        return scores.topk(top_k).indices


@right()
class SoftmaxOfTheChosen(SoftmaxRouter):
    """Experts are chosen by their logits; renormalized weights are the softmax of the chosen logits."""

    def scores(self, logits):
        self.logits = logits
        return super().scores(logits)

    def choosable(self, scores, experts):
        return super().choosable(self.logits.masked_fill(self.logits == -torch.inf, -3e38), experts)

    def weigh(self, scores, ids, renormalize):
        return self.logits.gather(1, ids).softmax(1) if renormalize else super().weigh(scores, ids, False)


@right()
class ExponentialsOfTwo(SoftmaxRouter):
    """Powers of two, as GPUs have an instruction for them."""

    def scores(self, logits):
        exponentials = ((logits - logits.detach().amax(1, keepdim=True)) * LOG2_E).exp2()
        return exponentials / self.sum(exponentials)


@right()
class LogSoftmaxFirst(SoftmaxRouter):
    """The exponential of a log-softmax."""

    def scores(self, logits):
        return logits.log_softmax(1).exp()


@right()
class Float64Inside(SoftmaxRouter):
    """Everything in float64, rounded at the end."""

    def load(self, logits):
        return super().load(logits).double()

    def sum(self, values):
        return values.double().sum(1, keepdim=True)

    def scores(self, logits):
        return logits.softmax(1)

    def store(self, weights, ids, logits):
        return weights.float(), ids


@right()
class OnlineSoftmax(SoftmaxRouter):
    """Maximum and sum are updated tile by tile."""

    def scores(self, logits):
        highest, total = torch.full((len(logits), 1), -torch.inf), torch.zeros(len(logits), 1)
        for tile in logits.split(16, 1):
            new = torch.maximum(highest, tile.detach().amax(1, keepdim=True))
            finite = new.masked_fill(new == -torch.inf, 0.0)
            total = total * (highest - finite).exp() + (tile - finite).exp().sum(1, keepdim=True)
            highest = new
        return (logits - highest).exp() / total


@right()
class SumBackwards(SoftmaxRouter):
    """Sums one after the other, from the last lane to the first."""

    def sum(self, values):
        return functools.reduce(torch.add, values.flip(1).split(1, 1))


@right()
class Sorted(SoftmaxRouter):
    """All experts are sorted, and the first top_k taken; ties in another order."""

    def select(self, scores, top_k):
        last = scores.shape[1] - 1
        return last - scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, :top_k]


@right()
class TimesTheReciprocal(SoftmaxRouter):
    """One division a row; the rest are products."""

    def scores(self, logits):
        exponentials = (logits - logits.detach().amax(1, keepdim=True)).exp()
        return exponentials * self.sum(exponentials).reciprocal()

    def weigh(self, scores, ids, renormalize):
        weights = super().weigh(scores, ids, False)
        return weights * self.sum(weights).reciprocal() if renormalize else weights


@right()
class SigmoidOfTorch(GroupedRouter):
    """torch's sigmoid in float32, and top-k."""

    def scores(self, logits):
        return logits.sigmoid()

    def select(self, scores, top_k):
        return scores.topk(top_k).indices


@right(differentiable=False)
class SigmoidWrittenOut(GroupedRouter):
    """1 / (1 + exp(-x)), of which autograd's derivative overflows."""

    def scores(self, logits):
        return 1 / (1 + (-logits).exp())


@right(differentiable=False)
class SigmoidByPowersOfTwo(GroupedRouter):
    """1 / (1 + 2^(-x log2 e)), of which autograd's derivative overflows."""

    def scores(self, logits):
        return (1 + (logits * -LOG2_E).exp2()).reciprocal()


@right()
class SigmoidInFloat64(GroupedRouter):
    """Scores and sums in float64, rounded at the end."""

    def scores(self, logits):
        return logits.double().sigmoid()

    def sum(self, values):
        return values.sum(1, keepdim=True)

    def store(self, weights, ids, logits):
        return weights.float(), ids


@right()
class GroupsSorted(GroupedRouter):
    """A group's score is the sum of the last two of its sorted members."""

    def group_scores(self, biased):
        return biased.sort(2).values[:, :, -2:].sum(2)


@right()
class ExpertsSorted(GroupedRouter):
    """All experts are sorted, and the first top_k taken; ties in another order."""

    def select(self, scores, top_k):
        last = scores.shape[1] - 1
        return last - scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, :top_k]


@right()
class KeptGroupsCompacted(GroupedRouter):
    """The members of kept groups are gathered, chosen from, and mapped back."""

    def select(self, scores, top_k):
        if not (scores == -torch.inf).any():
            return super().select(scores, top_k)
        order = (scores == -torch.inf).int().argsort(dim=1, stable=True)
        members = int((scores[0] != -torch.inf).sum())
        return order.gather(1, super().select(scores.gather(1, order)[:, :members], top_k))


@right(differentiable=False)
class FactorFirst(GroupedRouter):
    """Each weight is multiplied by factor / sum, of which autograd's derivative overflows."""

    def weigh_groups(self, scores, biased, ids, renormalize, factor):
        weights = scores.gather(1, ids)
        return weights * (factor / (self.sum(weights) + self.epsilon)) if renormalize else factor * weights


@right()
class SumOneByOne(GroupedRouter):
    """Weights are summed one after the other in float32, from the last to the first."""

    def sum(self, values):
        return functools.reduce(torch.add, values.flip(1).split(1, 1))


@right("routers.sigmoid_topk")
class OneGroupWithoutBias(GroupedRouter):
    """The grouped router's kernel, with all experts in one group and a bias of 0."""

    def __call__(self, router_logits, *, top_k, renormalize):
        options = {"num_groups": 1, "topk_groups": 1, "renormalize": renormalize, "routed_scaling_factor": 1.0}
        return super().__call__(router_logits, torch.zeros(router_logits.shape[1]), top_k=top_k, **options)


@right("routers.hash_router", validates=False)
class TableAsMatrix:
    """Rows of a one-hot matrix, times the table."""

    def __call__(self, token_ids, table):
        words = torch.nn.functional.one_hot(token_ids, len(table))
        return torch.ones(len(token_ids)), (words * table).sum(1)


@right("routers.hash_router", validates=False)
class TableAsLookup:
    """`torch.embedding` of a table of one column."""

    def __call__(self, token_ids, table):
        return torch.ones(len(token_ids)), torch.embedding(table[:, None], token_ids.long())[:, 0]
