"""Right but different ways to dispatch."""

import torch

from gaugeblock.conformance.selftest.simulated.dispatch import Align, Permute, Sort, Unpermute
from gaugeblock.conformance.selftest.variant import right


@right(dtypes=("float32",))
class RanksBySorting(Sort):
    """One stable sort, and its inverse."""

    def ranks(self, ids):
        starts = ids.bincount().cumsum(0) - ids.bincount()
        return ids.argsort(stable=True).argsort() - starts[ids]

    def order(self, places):
        return places.argsort()


@right(dtypes=("float32",))
class KeysWithPlaces(Sort):
    """A sort that is not stable, of ids times their number plus the place."""

    def order(self, places):
        self.places = places
        return super().order(places)

    def ranks(self, ids):
        keys = (ids * len(ids) + torch.arange(len(ids))).sort().values
        return torch.searchsorted(keys, ids * len(ids) + torch.arange(len(ids))) - self.starts(ids.bincount())[ids]


@right(dtypes=("float32",))
class BlocksOneByOne(Align):
    """Experts ask for blocks one after the other."""

    def starts(self, sizes):
        first, starts = 0, []
        for size in sizes.tolist():
            starts.append(first)
            first += size
        return torch.tensor(starts)


@right(dtypes=("float32",))
class BlocksConcatenated(Align):
    """The rows of each expert are looked up and padded by themselves."""

    def __call__(self, topk_ids, *, num_experts, block_size):
        rows, experts, padded = super().__call__(topk_ids, num_experts=num_experts, block_size=block_size)
        ids, none = topk_ids.flatten(), topk_ids.numel()
        groups = [torch.where(ids == expert)[0] for expert in range(num_experts)]
        parts = [torch.nn.functional.pad(each, (0, -len(each) % block_size), value=none) for each in groups]
        missing = len(rows) - sum(map(len, parts))
        return torch.nn.functional.pad(torch.cat(parts), (0, missing), value=none), experts, padded


@right()
class PermuteByOneHot(Permute):
    """Each place takes its token from all, of which the others are masked."""

    def gather(self, hidden_states, tokens):
        chosen = tokens[:, None] == torch.arange(len(hidden_states))
        return torch.where(chosen[..., None], hidden_states.float(), 0.0).sum(1).to(hidden_states.dtype)


@right()
class PermuteByRepeating(Permute):
    """Tokens are repeated for each of their choices, then ordered."""

    def __call__(self, hidden_states, order, *, top_k):
        self.validate(hidden_states, order, top_k)
        return hidden_states.float().repeat_interleave(top_k, 0)[order.long()].to(hidden_states.dtype)


@right()
class LastChoiceFirst(Unpermute):
    """The sum begins with the last choice."""

    def sum(self, summands):
        return super().sum(summands[::-1])


@right()
class UnpermuteInFloat64(Unpermute):
    """Everything in float64, rounded once."""

    def weighted(self, row, weight):
        return row.double() * weight.double()
