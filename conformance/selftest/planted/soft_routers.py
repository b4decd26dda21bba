"""Bugs of routers that balance by softmaxes over tokens."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.soft_routers import SinkhornRouter, SoftMoeRouter


@fault(caught_by="parity", kind="structural", source="ports of arXiv:2308.00951", smallest=2)
class DispatchAndCombineSwapped(SoftMoeRouter):
    """Slots and tokens are taken for each other."""

    def returned(self, dispatch, combine):
        return combine, dispatch


@fault(caught_by="parity", kind="structural", source="ports of arXiv:2308.00951", smallest=2)
class OneSoftmaxForBoth(SoftMoeRouter):
    """Combine weights are the dispatch weights."""

    def returned(self, dispatch, combine):
        return dispatch, dispatch


@fault(caught_by="parity", kind="structural", source="lucidrains/soft-moe-pytorch masks", smallest=4)
class TokensOfAllSequencesMixed(SoftMoeRouter):
    """The softmax over tokens is taken over those of the whole batch."""

    def over_tokens(self, logits):
        return self.softmax(logits.flatten(0, 1)[None], 1).view(logits.shape)


@fault(caught_by="parity", kind="precision", source="online softmax")
class HighestOfTheFirstTile(SoftMoeRouter):
    """The maximum is that of the first tokens, so that exponentials of later ones overflow."""

    def highest(self, logits, dim):
        return logits.detach().narrow(dim, 0, 1)


@fault(caught_by="parity", kind="precision", source="softmax in the dtype of the model")
class SumsInBfloat16(SoftMoeRouter):
    """Sums are rounded to bfloat16."""

    def sum(self, values, dim):
        return super().sum(values, dim).bfloat16().float()


@fault(caught_by="gradients", kind="gradient", source="fused softmaxes")
class GradientOfCombineAlone(SoftMoeRouter):
    """No gradient flows through the dispatch weights but zeros."""

    def over_tokens(self, logits):
        return super().over_tokens(logits.detach()) + 0 * logits.nan_to_num(neginf=0.0)


@fault(caught_by="parity", kind="boundary", source="padded tiles")
class PaddingIsAToken(SoftMoeRouter):
    """Tokens that fill the last tile take part as zeros."""

    def over_tokens(self, logits):
        tokens = logits.shape[1]
        return self.softmax(torch.nn.functional.pad(logits, (0, 0, 0, -tokens % 16)), 1)[:, :tokens]


@fault(caught_by="parity", kind="boundary", source="Megatron-LM's sinkhorn")
class OneIterationLess(SinkhornRouter):
    """The first iteration is not counted."""

    def iterations(self, num_iterations):
        return max(0, num_iterations - 1)


@fault(caught_by="parity", kind="structural", source="Megatron-LM's sinkhorn")
class StoppedWhenColumnsHardlyChange(SinkhornRouter):
    """Iterations end when columns move by less than a tenth."""

    def balanced(self, logits, num_iterations):
        columns = torch.zeros(1, logits.shape[1])
        for _ in range(num_iterations if len(logits) else 0):
            columns, before = self.iterated(logits, columns), columns
            if (columns - before).abs().mean() < 1.0:
                break
        return logits + columns


@fault(caught_by="parity", kind="structural", source="ports of S-BASE")
class ColumnsBeforeRows(SinkhornRouter):
    """Columns are divided by their sums before rows."""

    def iterated(self, logits, columns):
        rows = torch.zeros(len(logits), 1) if not columns.any() else -self.log_of_sum(logits + columns, 1)
        return -self.log_of_sum(logits + rows, 0)


@fault(caught_by="parity", kind="structural", source="ports of S-BASE")
class RowsAlone(SinkhornRouter):
    """Rows are divided by their sums, and columns are not, so that nothing is balanced."""

    def iterated(self, logits, columns):
        return columns


@fault(caught_by="parity", kind="structural", source="ports of S-BASE")
class WeightsOfTheBalanced(SinkhornRouter):
    """Weights are made of the balanced logits, not of the raw ones."""

    def balanced(self, logits, num_iterations):
        self.kept = super().balanced(logits, num_iterations)
        return self.kept

    def activated(self, logits, score_function):
        return super().activated(self.kept + (logits - logits.detach()), score_function)


@fault(caught_by="parity", kind="structural", source="Megatron-LM")
class FunctionByTopK(SinkhornRouter):
    """The score function is that of Megatron-LM's for so many experts, whatever is asked for."""

    def activation(self, score_function, top_k):
        return "sigmoid" if top_k == 1 else "softmax"


@fault(caught_by="parity", kind="structural", source="Megatron-LM")
class SoftmaxOfTheChosen(SinkhornRouter):
    """The softmax is taken over the chosen experts."""

    def activated(self, logits, score_function):
        self.is_softmax = score_function == "softmax"
        return super().activated(logits, score_function)

    def weigh_by(self, scores, logits, ids):
        return logits.gather(1, ids).softmax(1) if self.is_softmax else super().weigh_by(scores, logits, ids)


@fault(caught_by="parity", kind="precision", source="Megatron-LM's exp(cost)")
class ExponentialsOverflow(SinkhornRouter):
    """Exponentials of the logits themselves are infinite above 88."""

    def log_of_sum(self, logits, dim):
        return logits.exp().sum(dim, keepdim=True).log()

    def balanced(self, logits, num_iterations):
        return super().balanced(logits, num_iterations).nan_to_num(0.0)
