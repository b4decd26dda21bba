"""Right but different losses and figures of a router's load."""

import torch
from torch.nn.functional import logsigmoid, one_hot

from gaugeblock.conformance.selftest.simulated.auxiliary_losses import BiasUpdate, Entropy, Load, SequenceLoss
from gaugeblock.conformance.selftest.variant import right


@right()
class SoftmaxOfLogSigmoids(SequenceLoss):
    """Scores divided by their sum are the softmax of their logarithms."""

    def scores(self, logits, scores):
        return logsigmoid(logits) if scores == "sigmoid" else logits

    def normalized(self, logits, scores):
        return scores.softmax(2)


@right()
class SequenceBySequence(SequenceLoss):
    """Each sequence's loss is computed by itself; those of padding alone are left out."""

    def __call__(self, router_logits, topk_ids, attention_mask, *, scores):
        self.validate(router_logits, topk_ids, attention_mask, scores)
        call = super().__call__
        parts = [
            call(router_logits[each, None], topk_ids[each, None], attention_mask[each, None], scores=scores)
            for each in attention_mask.any(1).nonzero()[:, 0].tolist()
        ]
        return torch.stack(parts).mean() if parts else 0.0 * self.masked(router_logits.float(), attention_mask).sum()


@right()
class SequencesInFloat64(SequenceLoss):
    """Everything in float64, rounded once."""

    def masked(self, logits, mask):
        return super().masked(logits.double(), mask)

    def sum(self, values):
        return values.sum(1)

    def mean(self, losses, mask):
        return super().mean(losses, mask).float()


@right()
class EntropyByLogSoftmax(Entropy):
    """The definition."""

    def entropy(self, logits):
        logs = logits.log_softmax(1)
        return -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(1)


@right()
class EntropyInFloat64(Entropy):
    """Everything in float64, rounded once."""

    def entropy(self, logits):
        return super().entropy(logits.double())


@right()
class EntropyOfHalves(Entropy):
    """Experts in two parts: the entropy of which part, and the mean of those within the parts."""

    def entropy(self, logits):
        middle = (logits.shape[1] + 1) // 2
        logits = logits.double().masked_fill(logits == -torch.inf, -1e9)
        parts = [part for part in logits.tensor_split([middle], 1) if part.shape[1]]
        which = torch.stack([part.logsumexp(1) for part in parts], 1)
        within = torch.stack([super(EntropyOfHalves, self).entropy(part) for part in parts], 1)
        return (super().entropy(which) + (which.softmax(1) * within).sum(1)).float()


@right(dtypes=("float32",))
class LoadOfOneHots(Load):
    """Sums of one-hot rows."""

    def count(self, ids, mask, num_experts):
        return (one_hot(ids.long(), num_experts) * mask[:, None, None]).sum((0, 1))


@right(dtypes=("float32",))
class LoadOfSortedIds(Load):
    """Ids are sorted; an expert's load is the distance between two searches."""

    def count(self, ids, mask, num_experts):
        ids = torch.where(mask[:, None], ids.long(), num_experts).flatten().sort().values
        return torch.searchsorted(ids, torch.arange(num_experts + 1)).diff()


@right(dtypes=("float32",))
class SignOfFloat64(BiasUpdate):
    """The mean is one of float64, which is exact enough for these loads."""

    def step(self, loads):
        return (loads.double().mean() - loads.double()).sign().float()


@right(dtypes=("float32",))
class TwoComparisons(BiasUpdate):
    """More where the load is below the mean, less where it is above."""

    def step(self, loads):
        scaled = len(loads) * loads.long()
        return (scaled < loads.sum()).int() - (scaled > loads.sum()).int()
