"""Right but different experts."""

import torch
from torch.nn.functional import silu

from gaugeblock.conformance.selftest.simulated.experts import Experts
from gaugeblock.conformance.selftest.variant import LOG2_E, right


@right()
class ReversedTiles(Experts):
    """Sums run from the last tile to the first."""

    def tiles(self, left, right):
        return super().tiles(left, right)[::-1]


@right()
class ShuffledTiles(Experts):
    """Sums take every other tile first."""

    def tiles(self, left, right):
        tiles = super().tiles(left, right)
        return tiles[1::2] + tiles[::2]


@right()
class SplitK(Experts):
    """Four partial sums, added at the end."""

    def accumulate(self, left, right):
        tiles = self.tiles(left, right)
        parts = [sum(self.dot(*tile) for tile in tiles[each::4]) for each in range(min(4, len(tiles)))]
        return sum(parts[1:], parts[0])


@right()
class SmallTiles(Experts):
    """Tiles of 16."""

    rows, columns, depth = 16, 16, 16


@right()
class LargeTiles(Experts):
    """Tiles of 128."""

    rows, columns, depth = 128, 128, 128


@right(batch_invariant=False)
class ProductsOfTheLibrary(Experts):
    """float32 products of whole matrices, in the library's order."""

    def matmul(self, left, right):
        return left @ right.mT


@right()
class WholeSumsInFloat64(Experts):
    """Everything in float64, rounded once."""

    def expert(self, hidden, w13, w2, weights, dtype):
        gate, up = (hidden.double() @ w13.double().mT).chunk(2, 1)
        return (silu(gate) * up) @ w2.double().mT

    def allocate(self, rows, columns):
        return torch.empty(rows, columns, dtype=torch.float64)

    def combine(self, outs, topk_weights):
        return (topk_weights.double()[:, :, None] * outs).sum(1)


@right()
class ActivationInFloat32(Experts):
    """The activation is not rounded before the second product."""

    def expert(self, hidden, w13, w2, weights, dtype):
        return super().expert(hidden, w13, w2, weights, torch.float32)


@right()
class WeightInTheEpilogue(Experts):
    """The router weight scales the activation, in float32 before it is rounded."""

    def expert(self, hidden, w13, w2, weights, dtype):
        scale = torch.nn.functional.pad(weights.float(), (0, len(hidden) - len(weights)))[:, None]
        gate, up = self.split(self.matmul(hidden, w13))
        return self.matmul((scale * self.activate(gate, up)).to(dtype).float(), w2)

    def combine(self, outs, topk_weights):
        return super().combine(outs, torch.ones_like(topk_weights))


@right()
class SiluWrittenOut(Experts):
    """gate / (1 + exp(-gate))."""

    def activate(self, gate, up):
        return gate / (1 + (-gate).exp()) * up


@right(differentiable=False)
class SiluByPowersOfTwo(Experts):
    """up · gate · 1 / (1 + 2^(-gate log2 e)), of which autograd's derivative overflows."""

    def activate(self, gate, up):
        return up * gate * (1 + (gate * -LOG2_E).exp2()).reciprocal()


@right()
class ChoicesBackwards(Experts):
    """Choices are added from the last to the first."""

    def combine(self, outs, topk_weights):
        return super().combine(outs.flip(1), topk_weights.flip(1))


@right("experts.fused_swiglu", batch_invariant=False)
class TokenByToken:
    """Each token multiplies copies of its experts' matrices."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        matrices, hidden = w13.float()[topk_ids], hidden_states.float()
        gate, up = torch.einsum("tkih,th->tki", matrices, hidden).chunk(2, -1)
        outs = torch.einsum("tkhi,tki->tkh", w2.float()[topk_ids], silu(gate) * up)
        return torch.einsum("tk,tkh->th", topk_weights.float(), outs).to(hidden_states.dtype)


@right("experts.fused_swiglu", batch_invariant=False)
class ExpertByExpert:
    """Each expert adds its weighted rows to the tokens that chose it."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        hidden = hidden_states.float()
        total = torch.zeros_like(hidden)
        for expert, (first, second) in enumerate(zip(w13.float().unbind(), w2.float().unbind(), strict=True)):
            tokens, choices = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (hidden[tokens] @ first.mT).chunk(2, 1)
            total = total.index_add(0, tokens, topk_weights[tokens, choices, None].float() * ((silu(gate) * up) @ second.mT))
        return total.to(hidden_states.dtype)


@right("experts.fused_swiglu", batch_invariant=False, dtypes=("float16", "bfloat16"), rounding="eager")
class EveryOperationRounded:
    """PyTorch in the dtype of the tokens, operation by operation."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        total = torch.zeros_like(hidden_states)
        for expert, (first, second) in enumerate(zip(w13.unbind(), w2.unbind(), strict=True)):
            tokens, choices = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = (hidden_states[tokens] @ first.mT).chunk(2, 1)
            out = ((silu(gate) * up) @ second.mT) * topk_weights[tokens, choices, None]
            total = total.index_add(0, tokens, out.to(total.dtype))
        return total
