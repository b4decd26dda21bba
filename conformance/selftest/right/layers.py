"""Right but different adaptive LayerNorms."""

import torch
from torch.nn.functional import layer_norm

from gaugeblock.conformance.selftest.simulated.layers import GatedNormModulate, NormModulate
from gaugeblock.conformance.selftest.variant import right


@right()
class NormOfTorch(NormModulate):
    """torch's layer_norm in float32."""

    def normalize(self, tokens, eps):
        return layer_norm(tokens, tokens.shape[-1:], eps=eps)


@right()
class SmallBlocks(NormModulate):
    """Blocks of 8 columns."""

    columns = 8


@right()
class ColumnByColumn(NormModulate):
    """Sums one after the other, from the last column to the first."""

    def sum(self, values):
        total = torch.zeros_like(values[..., :1])
        for column in values.flip(-1).split(1, -1):
            total = total + column
        return total


@right()
class WelfordByBlocks(NormModulate):
    """Means and sums of squares of blocks are merged."""

    def normalize(self, tokens, eps):
        mean, squares, count = tokens[..., :1], torch.zeros_like(tokens[..., :1]), 1
        for block in tokens[..., 1:].split(16, -1):
            size = block.shape[-1]
            new = self.sum(block) / size
            total, delta = count + size, new - mean
            squares = squares + self.sum((block - new).square()) + delta * delta * (count * size / total)
            mean, count = mean + delta * (size / total), total
        return (tokens - mean) * self.rstd(squares / count, eps)


@right()
class RootAndQuotient(NormModulate):
    """Divided by the deviation, not multiplied by its reciprocal."""

    def normalize(self, tokens, eps):
        centred = self.center(tokens, self.mean(tokens))
        return centred / (self.variance(centred) + eps).sqrt()


@right()
class ModulationFused(NormModulate):
    """Scale and shift by one fused multiply-add."""

    def modulate(self, normalized, shift, scale):
        return torch.addcmul(shift[:, None], normalized, 1 + scale[:, None])


@right()
class WholeTokensInFloat64(NormModulate):
    """Everything in float64, rounded once."""

    def __call__(self, hidden_states, shift, scale, *, eps):
        self.validate(hidden_states, shift, scale, eps)
        normalized = layer_norm(hidden_states.double(), hidden_states.shape[-1:], eps=eps)
        return self.store(self.modulate(normalized, shift.double(), scale.double()), hidden_states)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class EveryOperationRounded(NormModulate):
    """PyTorch in the dtype of the tokens, operation by operation."""

    def __call__(self, hidden_states, shift, scale, *, eps):
        normalized = layer_norm(hidden_states, hidden_states.shape[-1:], eps=eps)
        return self.modulate(normalized, shift, scale)


@right()
class GatedNormOfTorch(GatedNormModulate):
    """torch's addcmul and layer_norm in float32."""

    def add(self, residual, branch, gate):
        return torch.addcmul(residual, gate[:, None].expand_as(branch), branch)

    def normalize(self, tokens, eps):
        return layer_norm(tokens, tokens.shape[-1:], eps=eps)


@right()
class GatedSmallBlocks(GatedNormModulate):
    """Blocks of 8 columns."""

    columns = 8


@right()
class GatedWholeTokensInFloat64(GatedNormModulate):
    """Everything in float64, each result rounded once."""

    def __call__(self, residual, branch, gate, shift, scale, *, eps):
        hidden_states = self.add(residual.double(), branch.double(), gate.double())
        modulated = self.modulate(layer_norm(hidden_states, residual.shape[-1:], eps=eps), shift.double(), scale.double())
        return self.store(hidden_states, residual), self.store(modulated, residual)


@right()
class UnfusedInFloat32(GatedNormModulate):
    """The stream is kept in float32 between two kernels."""

    def __call__(self, residual, branch, gate, shift, scale, *, eps):
        hidden_states = self.add(residual.float(), branch.float(), gate.float())
        modulated = NormModulate()(hidden_states, shift.float(), scale.float(), eps=eps)
        return self.store(hidden_states, residual), self.store(modulated, residual)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class GatedEveryOperationRounded(GatedNormModulate):
    """PyTorch in the dtype of the tokens, operation by operation."""

    def __call__(self, residual, branch, gate, shift, scale, *, eps):
        hidden_states = self.add(residual, branch, gate)
        return hidden_states, self.modulate(layer_norm(hidden_states, residual.shape[-1:], eps=eps), shift, scale)
