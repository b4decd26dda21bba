"""Right but different implementations: no judgement of theirs may be an alarm."""

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu

from gaugeblock.conformance.cases import Case
from gaugeblock.conformance.faults.simulated import Experts, GroupedRouter, SoftmaxRouter
from gaugeblock.conformance.registry import DType, Implementation
from gaugeblock.conformance.trial import Subject

SOFTMAX, GROUPED, EXPERTS = "routers.softmax_topk", "routers.grouped_sigmoid_topk", "experts.fused_swiglu"
EVERY_DTYPE: tuple[DType, ...] = ("float32", "float16", "bfloat16")
LOG2_E = 1.4426950408889634
_variants: list["Variant"] = []


@dataclass(frozen=True)
class Variant:
    """A right implementation.

    Attributes:
        name: Of the implementation.
        contract: What it fulfils.
        candidate: Makes it.
        summary: How it differs, in one sentence.
        fits: Whether it is made for a case: some have no groups of one expert, or want aligned sizes.
        claims: Fields of `Implementation` other than the defaults.
    """

    name: str
    contract: str
    candidate: Callable[[], Callable[..., Any]]
    summary: str
    fits: Callable[[Case], bool]
    claims: Mapping[str, Any]

    def subjects(self) -> list[Subject]:
        """The variant at each of its dtypes."""
        implementation = Implementation(self.contract, self.name, self.candidate(), **self.claims)
        return [Subject(implementation, dtype, "cpu") for dtype in implementation.dtypes]


def every_case(case: Case) -> bool:
    """Fits every case."""
    return True


def right(
    contract: str, *, fits: Callable[[Case], bool] = every_case, dtypes: tuple[DType, ...] = EVERY_DTYPE, **claims: Any
) -> Callable[[type], type]:
    """Registers a class whose instances are right implementations of `contract`; the fields are those of `Variant`."""

    def register(candidate: type) -> type:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", candidate.__name__).lower()
        _variants.append(Variant(name, contract, candidate, str(candidate.__doc__), fits, {"dtypes": dtypes} | claims))
        return candidate

    return register


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Every right variant; those made of transformers' modules where that is installed."""
    if importlib.util.find_spec("transformers"):
        importlib.import_module("gaugeblock.conformance.faults.right_transformers")
    return tuple(_variants)


# ------------------------------------------------------------------------------------------------------- softmax_topk

right(SOFTMAX)(SoftmaxRouter)


@right(SOFTMAX)
class SoftmaxOfTorch(SoftmaxRouter):
    """torch's softmax and top-k."""

    def scores(self, logits):
        return logits.softmax(1)

    def select(self, scores, top_k):
        return scores.topk(top_k).indices


@right(SOFTMAX)
class SoftmaxOfTheChosen(SoftmaxRouter):
    """Experts are chosen by their logits; renormalized weights are the softmax of the chosen logits."""

    def scores(self, logits):
        self.logits = logits
        return super().scores(logits)

    def choosable(self, scores, experts):
        return super().choosable(self.logits.masked_fill(self.logits == -torch.inf, -3e38), experts)

    def weigh(self, scores, ids, renormalize):
        return self.logits.gather(1, ids).softmax(1) if renormalize else super().weigh(scores, ids, False)


@right(SOFTMAX)
class ExponentialsOfTwo(SoftmaxRouter):
    """Powers of two, as GPUs have an instruction for them."""

    def scores(self, logits):
        exponentials = ((logits - logits.detach().amax(1, keepdim=True)) * LOG2_E).exp2()
        return exponentials / self.sum(exponentials)


@right(SOFTMAX)
class LogSoftmaxFirst(SoftmaxRouter):
    """The exponential of a log-softmax."""

    def scores(self, logits):
        return logits.log_softmax(1).exp()


@right(SOFTMAX)
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


@right(SOFTMAX)
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


@right(SOFTMAX)
class SumBackwards(SoftmaxRouter):
    """Sums one after the other, from the last lane to the first."""

    def sum(self, values):
        return functools.reduce(torch.add, values.flip(1).split(1, 1))


@right(SOFTMAX)
class Sorted(SoftmaxRouter):
    """All experts are sorted, and the first top_k taken; ties in another order."""

    def select(self, scores, top_k):
        last = scores.shape[1] - 1
        return last - scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, :top_k]


@right(SOFTMAX)
class TimesTheReciprocal(SoftmaxRouter):
    """One division a row; the rest are products."""

    def scores(self, logits):
        exponentials = (logits - logits.detach().amax(1, keepdim=True)).exp()
        return exponentials * self.sum(exponentials).reciprocal()

    def weigh(self, scores, ids, renormalize):
        weights = super().weigh(scores, ids, False)
        return weights * self.sum(weights).reciprocal() if renormalize else weights


# ----------------------------------------------------------------------------------------------- grouped_sigmoid_topk

right(GROUPED)(GroupedRouter)


@right(GROUPED)
class SigmoidOfTorch(GroupedRouter):
    """torch's sigmoid in float32, and top-k."""

    def scores(self, logits):
        return logits.sigmoid()

    def select(self, scores, top_k):
        return scores.topk(top_k).indices


@right(GROUPED, differentiable=False)
class SigmoidWrittenOut(GroupedRouter):
    """1 / (1 + exp(-x)), of which autograd's derivative overflows."""

    def scores(self, logits):
        return 1 / (1 + (-logits).exp())


@right(GROUPED, differentiable=False)
class SigmoidByPowersOfTwo(GroupedRouter):
    """1 / (1 + 2^(-x log2 e)), of which autograd's derivative overflows."""

    def scores(self, logits):
        return (1 + (logits * -LOG2_E).exp2()).reciprocal()


@right(GROUPED)
class SigmoidInFloat64(GroupedRouter):
    """Scores and sums in float64, rounded at the end."""

    def scores(self, logits):
        return logits.double().sigmoid()

    def sum(self, values):
        return values.sum(1, keepdim=True)

    def store(self, weights, ids, logits):
        return weights.float(), ids


@right(GROUPED)
class GroupsSorted(GroupedRouter):
    """A group's score is the sum of the last two of its sorted members."""

    def group_scores(self, biased):
        return biased.sort(2).values[:, :, -2:].sum(2)


@right(GROUPED)
class ExpertsSorted(GroupedRouter):
    """All experts are sorted, and the first top_k taken; ties in another order."""

    def select(self, scores, top_k):
        last = scores.shape[1] - 1
        return last - scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, :top_k]


@right(GROUPED)
class KeptGroupsCompacted(GroupedRouter):
    """The members of kept groups are gathered, chosen from, and mapped back."""

    def select(self, scores, top_k):
        if not (scores == -torch.inf).any():
            return super().select(scores, top_k)
        order = (scores == -torch.inf).int().argsort(dim=1, stable=True)
        members = int((scores[0] != -torch.inf).sum())
        return order.gather(1, super().select(scores.gather(1, order)[:, :members], top_k))


@right(GROUPED, differentiable=False)
class FactorFirst(GroupedRouter):
    """Each weight is multiplied by factor / sum, of which autograd's derivative overflows."""

    def weigh_groups(self, scores, biased, ids, renormalize, factor):
        weights = scores.gather(1, ids)
        return weights * (factor / (self.sum(weights) + self.epsilon)) if renormalize else factor * weights


@right(GROUPED)
class SumOneByOne(GroupedRouter):
    """Weights are summed one after the other in float32, from the last to the first."""

    def sum(self, values):
        return functools.reduce(torch.add, values.flip(1).split(1, 1))


# -------------------------------------------------------------------------------------------------------------- experts

right(EXPERTS)(Experts)


@right(EXPERTS)
class ReversedTiles(Experts):
    """Sums run from the last tile to the first."""

    def tiles(self, left, right):
        return super().tiles(left, right)[::-1]


@right(EXPERTS)
class ShuffledTiles(Experts):
    """Sums take every other tile first."""

    def tiles(self, left, right):
        tiles = super().tiles(left, right)
        return tiles[1::2] + tiles[::2]


@right(EXPERTS)
class SplitK(Experts):
    """Four partial sums, added at the end."""

    def accumulate(self, left, right):
        tiles = self.tiles(left, right)
        parts = [sum(self.dot(*tile) for tile in tiles[each::4]) for each in range(min(4, len(tiles)))]
        return sum(parts[1:], parts[0])


@right(EXPERTS)
class SmallTiles(Experts):
    """Tiles of 16."""

    rows, columns, depth = 16, 16, 16


@right(EXPERTS)
class LargeTiles(Experts):
    """Tiles of 128."""

    rows, columns, depth = 128, 128, 128


@right(EXPERTS, batch_invariant=False)
class ProductsOfTheLibrary(Experts):
    """float32 products of whole matrices, in the library's order."""

    def matmul(self, left, right):
        return left @ right.mT


@right(EXPERTS)
class WholeSumsInFloat64(Experts):
    """Everything in float64, rounded once."""

    def expert(self, hidden, w13, w2, weights, dtype):
        gate, up = (hidden.double() @ w13.double().mT).chunk(2, 1)
        return (silu(gate) * up) @ w2.double().mT

    def allocate(self, rows, columns):
        return torch.empty(rows, columns, dtype=torch.float64)

    def combine(self, outs, topk_weights):
        return (topk_weights.double()[:, :, None] * outs).sum(1)


@right(EXPERTS)
class ActivationInFloat32(Experts):
    """The activation is not rounded before the second product."""

    def expert(self, hidden, w13, w2, weights, dtype):
        return super().expert(hidden, w13, w2, weights, torch.float32)


@right(EXPERTS)
class WeightInTheEpilogue(Experts):
    """The router weight scales the activation, in float32 before it is rounded."""

    def expert(self, hidden, w13, w2, weights, dtype):
        scale = torch.nn.functional.pad(weights.float(), (0, len(hidden) - len(weights)))[:, None]
        gate, up = self.split(self.matmul(hidden, w13))
        return self.matmul((scale * self.activate(gate, up)).to(dtype).float(), w2)

    def combine(self, outs, topk_weights):
        return super().combine(outs, torch.ones_like(topk_weights))


@right(EXPERTS)
class SiluWrittenOut(Experts):
    """gate / (1 + exp(-gate))."""

    def activate(self, gate, up):
        return gate / (1 + (-gate).exp()) * up


@right(EXPERTS, differentiable=False)
class SiluByPowersOfTwo(Experts):
    """up · gate · 1 / (1 + 2^(-gate log2 e)), of which autograd's derivative overflows."""

    def activate(self, gate, up):
        return up * gate * (1 + (gate * -LOG2_E).exp2()).reciprocal()


@right(EXPERTS)
class ChoicesBackwards(Experts):
    """Choices are added from the last to the first."""

    def combine(self, outs, topk_weights):
        return super().combine(outs.flip(1), topk_weights.flip(1))


@right(EXPERTS, batch_invariant=False)
class TokenByToken:
    """Each token multiplies copies of its experts' matrices."""

    def __call__(self, hidden_states, w13, w2, topk_weights, topk_ids):
        matrices, hidden = w13.float()[topk_ids], hidden_states.float()
        gate, up = torch.einsum("tkih,th->tki", matrices, hidden).chunk(2, -1)
        outs = torch.einsum("tkhi,tki->tkh", w2.float()[topk_ids], silu(gate) * up)
        return torch.einsum("tk,tkh->th", topk_weights.float(), outs).to(hidden_states.dtype)


@right(EXPERTS, batch_invariant=False)
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


@right(EXPERTS, batch_invariant=False, dtypes=("float16", "bfloat16"), profile="eager")
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
