"""Bugs of dispatch."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.dispatch import Align, Permute, Sort, Unpermute
from gaugeblock.reference.torch.dispatch import most_blocks


class RoundedAdditions(torch.autograd.Function):
    """A gather whose backward adds up row by row in the dtype of the rows."""

    @staticmethod
    def forward(ctx, hidden_states, tokens):
        ctx.num_tokens = len(hidden_states)
        ctx.save_for_backward(tokens)
        return hidden_states[tokens]

    @staticmethod
    def backward(ctx, grad):
        total = grad.new_zeros(ctx.num_tokens, grad.shape[1])
        for place, token in enumerate(ctx.saved_tensors[0].tolist()):
            total[token] += grad[place]
        return total, None


@fault(caught_by="parity", kind="structural", dtypes=("float32",))
class SortedFromTheEnd(Sort):
    """Rows of one expert lie in descending order: the sort is not stable."""

    def ranks(self, ids):
        return (ids[:, None] == ids[None, :]).triu(1).sum(1)


@fault(caught_by="parity", kind="structural", source="TileOPs#640", dtypes=("float32",))
class InverseOfAnInvolution(Sort):
    """The order is returned for its inverse: right where they are the same."""

    def order(self, places):
        return places


@fault(caught_by="parity", kind="boundary", source="mirage#664", dtypes=("float32",))
class EmptyExpertShiftsTheOffsets(Sort):
    """Offsets are those of the experts that have rows, one after the other."""

    def starts(self, sizes):
        starts = super().starts(sizes[sizes > 0])
        return torch.cat([starts, torch.zeros(len(sizes) - len(starts), dtype=torch.int64)])


@fault(caught_by="parity", kind="boundary", source="kekzl/imp#2056", dtypes=("float32",))
class RanksOfOneByte(Sort):
    """The places of an expert's rows wrap at 256."""

    def ranks(self, ids):
        return super().ranks(ids) % 256


@fault(caught_by="parity", kind="structural", source="llama.cpp#26310", dtypes=("float32",))
class TokensForRows(Sort):
    """The order is of tokens, not of their choices."""

    def __call__(self, topk_ids, *, num_experts):
        order, inverse, sizes = super().__call__(topk_ids, num_experts=num_experts)
        return order // topk_ids.shape[1], inverse, sizes


@fault(caught_by="parity", kind="structural", source="llama.cpp#26294", dtypes=("float32",))
class RepeatedIdIsOneRow(Sort):
    """An expert that a token chose twice has one row more, not two."""

    def ids(self, topk_ids):
        self.topk_ids = topk_ids.long()
        return super().ids(topk_ids)

    def sizes(self, ids, num_experts):
        return torch.zeros(len(self.topk_ids), num_experts, dtype=torch.int64).scatter(1, self.topk_ids, 1).sum(0)

    def starts(self, sizes):
        return super().starts(super().sizes(self.topk_ids.flatten(), len(sizes)))


@fault(caught_by="parity", kind="boundary", source="sglang#15250", dtypes=("float32",))
class OneBlockTooManyWhenFull(Align):
    """An expert whose last block is full gets another, as long as there are needless ones."""

    def __call__(self, topk_ids, *, num_experts, block_size):
        self.most = most_blocks(topk_ids.numel(), num_experts, block_size)
        return super().__call__(topk_ids, num_experts=num_experts, block_size=block_size)

    def padded(self, sizes, block_size):
        padded = super().padded(sizes, block_size)
        full = (sizes > 0) & (sizes == padded)
        return padded + block_size * (full & (full.cumsum(0) <= self.most - padded.sum() // block_size))


@fault(caught_by="parity", kind="boundary", dtypes=("float32",))
class PaddingIsRowZero(Align):
    """Padding names the first row, which is computed again and may be written again."""

    def sentinel(self, topk_ids):
        return 0


@fault(caught_by="parity", kind="boundary", source="padding named by the number of tokens", dtypes=("float32",))
class PaddingIsARow(Align):
    """Padding is the number of tokens: with several choices, that is a row."""

    def sentinel(self, topk_ids):
        return len(topk_ids)


@fault(caught_by="parity", kind="structural", source="vLLM's experts of needless blocks", dtypes=("float32",))
class NeedlessBlocksOfTheFirstExpert(Align):
    """Blocks that are not needed are those of expert 0."""

    def no_expert(self, num_experts):
        return 0


@fault(caught_by="parity", kind="structural", dtypes=("float32",))
class PaddedRowsNotCounted(Align):
    """What is returned as the number of places is that of rows."""

    def __call__(self, topk_ids, *, num_experts, block_size):
        rows, experts, _ = super().__call__(topk_ids, num_experts=num_experts, block_size=block_size)
        return rows, experts, torch.tensor(topk_ids.numel())


@fault(caught_by="parity", kind="structural", source="flashinfer#2629")
class RowForToken(Permute):
    """The routed row is taken for the token: right where each has one choice."""

    def __call__(self, hidden_states, order, *, top_k):
        self.num_tokens = len(hidden_states)
        return super().__call__(hidden_states, order, top_k=top_k)

    def tokens(self, order, top_k):
        return order % max(1, self.num_tokens)


@fault(caught_by="gradients", kind="gradient")
class LastPlaceAlone(Permute):
    """A token's gradient is that of one of its places, not of all."""

    def gather(self, hidden_states, tokens):
        last = torch.zeros(len(hidden_states), dtype=torch.int64).scatter(0, tokens, torch.arange(len(tokens)))
        counts = (last[tokens] == torch.arange(len(tokens)))[:, None]
        rows = super().gather(hidden_states, tokens)
        return torch.where(counts, rows, rows.detach())


@fault(caught_by="gradients", kind="precision", source="atomics of bfloat16", dtypes=("bfloat16",))
class GradientsAddedInBfloat16(Permute):
    """Each addition of a token's gradients is rounded."""

    def gather(self, hidden_states, tokens):
        return RoundedAdditions.apply(hidden_states, tokens)


@fault(caught_by="parity", kind="structural", source="TileOPs#640")
class OrderForInverse(Unpermute):
    """Places are read in the wrong direction."""

    def pairs(self, rows, inverse, weights):
        places = inverse.flatten().argsort().reshape(inverse.shape)
        return super().pairs(rows, places, weights)


@fault(caught_by="parity", kind="structural")
class WeightsOfTheSortedRows(Unpermute):
    """Weights are taken by place, as if they were sorted, too."""

    def pairs(self, rows, inverse, weights):
        flat = weights.flatten()
        return super().pairs(rows, inverse, flat[inverse % len(flat)])


@fault(caught_by="parity", kind="precision", dtypes=("bfloat16",), source="index_add of bfloat16")
class SummedInBfloat16(Unpermute):
    """Each addition is rounded."""

    def sum(self, summands):
        total = summands[0].bfloat16()
        for each in summands[1:]:
            total = total + each.bfloat16()
        return total


@fault(caught_by="parity", kind="structural", source="Automodel#2591")
class FirstChoiceUnweighted(Unpermute):
    """The first choice counts fully."""

    def pairs(self, rows, inverse, weights):
        return super().pairs(rows, inverse, torch.cat([torch.ones_like(weights[:, :1]), weights[:, 1:]], 1))


@fault(caught_by="gradients", kind="gradient")
class WeightsWithoutGradient(Unpermute):
    """Nothing trains the router."""

    def weighted(self, row, weight):
        return super().weighted(row, weight.detach())


@fault(caught_by="parity", kind="memory", source="flashinfer#3650")
class PaddingTimesZero(Unpermute):
    """Rows that no token has are multiplied by 0: NaN in them is NaN everywhere."""

    def pairs(self, rows, inverse, weights):
        pairs = super().pairs(rows, inverse, weights)
        return [(row + 0 * rows.sum(0), weight) for row, weight in pairs]
