"""Right ways to write routers that balance by softmaxes over tokens."""

import torch

from gaugeblock.conformance.selftest.simulated.soft_routers import SinkhornRouter, SoftMoeRouter
from gaugeblock.conformance.selftest.variant import LOG2_E, right


@right(batch_invariant=False)
class SoftmaxesOfTorch(SoftMoeRouter):
    """torch's softmaxes, one of the transposed logits."""

    def over_tokens(self, logits):
        return logits.transpose(1, 2).softmax(2).transpose(1, 2).contiguous()

    def over_slots(self, logits):
        return logits.softmax(2)


@right()
class ExponentialsOfTwo(SoftMoeRouter):
    """Powers of two, as GPUs have an instruction for them."""

    def softmax(self, logits, dim):
        exponentials = ((logits - self.highest(logits, dim)) * LOG2_E).exp2()
        return exponentials / self.sum(exponentials, dim)


@right()
class MatrixDividedInFloat64(SinkhornRouter):
    """Exponentials in float64, divided row by row and column by column."""

    def balanced(self, logits, num_iterations):
        wide = logits.double()
        matrix = (wide - wide.amax(1, keepdim=True)).exp().clamp(min=1e-300)
        for _ in range(num_iterations if len(logits) else 0):
            matrix = matrix / matrix.sum(1, keepdim=True)
            matrix = matrix / matrix.sum(0, keepdim=True)
        return matrix.log() if num_iterations else wide


@right()
class ColumnsFirstSoftmaxOfRows(SinkhornRouter):
    """The division of rows is a softmax, whose logarithm is taken again."""

    def iterated(self, logits, columns):
        return columns - self.log_of_sum((logits + columns).double().log_softmax(1).float(), 0)


@right()
class WeightsOfTheChosenAlone(SinkhornRouter):
    """Sigmoids are taken of the chosen alone."""

    def activated(self, logits, score_function):
        self.is_sigmoid = score_function == "sigmoid"
        return super().activated(logits, score_function)

    def weigh_by(self, scores, logits, ids):
        return torch.sigmoid(logits.gather(1, ids)) if self.is_sigmoid else super().weigh_by(scores, logits, ids)
