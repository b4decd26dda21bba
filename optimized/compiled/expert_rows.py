"""Which rows each expert has, and in what order they lie in memory.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), I intermediate_size. R are the rows of a batch of experts, n
those of one of them. I is divided into S parts, each i wide; in parts, a batch has B = S * R rows: expert by expert, an expert's
part by part, a part's in the order of the tokens.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag

BATCH_ELEMENTS = 2**19  # of an activation, 2 MB in float32: what is computed between products stays in the cache
BATCH_EXPERTS = 64  # a batch of all 256 experts saves nothing more, and a small case has several batches


class Batch(NamedTuple):
    """Experts whose rows are computed together, but for the products."""

    experts: list[int]
    sizes: list[int]  # rows of each, at least 1
    rows: slice  # among all rows sorted by expert
    in_parts: slice  # the same among the rows in parts
    token_R: torch.Tensor
    token_B: torch.Tensor
    weight_B1: torch.Tensor

    @property
    def parts(self) -> int:
        """Into how many the intermediate size is divided."""
        return len(self.token_B) // len(self.token_R)

    def each(self, rows_BX: torch.Tensor) -> list[torch.Tensor]:
        """Return each expert's rows, [S, n, X], of a batch in parts."""
        parts = self.parts
        rows = rows_BX.split([parts * size for size in self.sizes])
        return [each.view(parts, -1, rows_BX.shape[1]) for each in rows]

    def for_all_parts(self, rows_RX: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each expert's rows, [S, n, X], which are the same for all parts."""
        return rows_RX.expand(self.parts, -1, -1).split(self.sizes, 1)

    def of_all(self, rows_NI: torch.Tensor) -> torch.Tensor:
        """Return this batch of what is kept of all rows, [B, i]."""
        return rows_NI[self.rows].view(len(self.token_B), rows_NI.shape[1] // self.parts)


class Routes(NamedTuple):
    """The rows of all experts."""

    order_N: torch.Tensor  # the routed row at each position, sorted by expert; one expert's in the order of the tokens
    token_N: torch.Tensor  # its token
    weight_N: torch.Tensor
    first_E: torch.Tensor  # position of each expert's first row
    place_NS: torch.Tensor  # where the parts of the row at each position lie
    batches: list[Batch]

    @property
    def experts(self) -> list[int]:
        """Those that have rows, ascending."""
        return [expert for batch in self.batches for expert in batch.experts]

    def sum_of_parts(self, numbers: torch.Tensor) -> torch.Tensor:
        """Add up the parts of a number of each row, [S * N] of all batches; return [N], in the order of the tokens."""
        sums = numbers[self.place_NS].sum(1)
        return torch.empty_like(sums).index_copy_(0, self.order_N, sums)

    def sums_of_rows(self, rows_TX: torch.Tensor) -> torch.Tensor:
        """Add up the rows of each expert's tokens, weighted, in the order of the tokens; return [E, X]."""
        return embedding_bag(self.token_N, rows_TX, self.first_E, per_sample_weights=self.weight_N, mode="sum")


def routes_in_parts(topk_weights: torch.Tensor, topk_ids: torch.Tensor, *, num_experts: int, width: int, parts: int) -> Routes:
    """Sort rows by expert, and divide the experts that have any into batches whose activations fit the cache.

    Args:
        topk_weights: [num_tokens, top_k], in the dtype of the computation.
        topk_ids: [num_tokens, top_k], integer.
        num_experts: Of which the ids name some.
        width: Of the activation, intermediate_size.
        parts: Parts of it.
    """
    expert_N = topk_ids.flatten()
    sizes_E = expert_N.bincount(minlength=num_experts)
    order_N = expert_N.argsort(stable=True)
    token_N = order_N // topk_ids.shape[1]

    sorted_N = expert_N[order_N].to(torch.int64)
    first_E = sizes_E.cumsum(0) - sizes_E
    position_N = torch.arange(len(order_N))
    # of an expert, every part before this one has all of its rows
    place_NS = (position_N + (parts - 1) * first_E[sorted_N])[:, None] + sizes_E[sorted_N][:, None] * torch.arange(parts)
    token_B = torch.empty_like(place_NS).flatten().index_put_((place_NS,), token_N[:, None])
    weight_N = topk_weights.take(order_N)
    weight_B1 = weight_N.new_empty(place_NS.numel()).index_put_((place_NS,), weight_N[:, None])[:, None]

    batches, first = [], 0
    for experts, sizes in _divide(sizes_E.tolist(), most_rows=BATCH_ELEMENTS // max(width, 1)):
        rows = slice(first, first + sum(sizes))
        in_parts = slice(parts * rows.start, parts * rows.stop)
        first = rows.stop
        batches.append(Batch(experts, sizes, rows, in_parts, token_N[rows], token_B[in_parts], weight_B1[in_parts]))
    return Routes(order_N, token_N, weight_N, first_E, place_NS, batches)


def _divide(sizes: list[int], most_rows: int) -> list[tuple[list[int], list[int]]]:
    """Return batches of experts that have rows, and how many each has. One expert may have more than `most_rows`."""
    batches: list[tuple[list[int], list[int]]] = []
    for expert, size in enumerate(sizes):
        if not size:
            continue
        if not batches or sum(batches[-1][1]) + size > most_rows or len(batches[-1][0]) == BATCH_EXPERTS:
            batches.append(([], []))
        for each, last in zip((expert, size), batches[-1], strict=True):
            last.append(each)
    return batches


class Scratch:
    """Memory that one batch after the other borrows, by name; it grows to what the largest needs."""

    def __init__(self, like: torch.Tensor) -> None:
        self.like = like
        self.memory: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        size = math.prod(shape)
        if name not in self.memory or len(self.memory[name]) < size:
            self.memory[name] = self.like.new_empty(size)
        return self.memory[name][:size].view(shape)

    def rows(self, name: str, source: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return source[indices] in borrowed memory."""
        return torch.index_select(source, 0, indices, out=self(name, len(indices), source.shape[1]))


def gradient_of(weights: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
    """Return memory for the gradient of weights [num_experts, ...]: 0 for all but `experts`, ascending, whose are not filled.

    It lies in memory as the weights do, so that autograd need not copy it to the parameter's order.
    """
    gradient = torch.empty_like(weights)
    for before, after in pairwise([-1, *experts, len(weights)]):
        gradient[before + 1 : after].zero_()
    return gradient
