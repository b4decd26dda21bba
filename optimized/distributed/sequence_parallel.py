"""Pieces of sequence-parallel models: each rank has some of the tokens of each example, and all parameters.

All but attention is of each token by itself. Around attention one exchange deals the heads, so that a rank has all tokens of
some heads, and another one brings the tokens back: four of [batch_size, num_tokens, hidden_size] / world_size numbers each, for
queries, keys, values and the result.

What every rank has alike, parameters and inputs, goes through one `collectives.replicated` at the entrance. Streams of
joint attention are cut each by itself and put side by side on every rank; that the tokens of all ranks then alternate between the
streams makes no difference to attention without a mask. A stream whose length the ranks do not divide is filled up with tokens
that attention leaves out.

Source: Jacobs et al. 2023 (arXiv:2309.14509), section 3 (DeepSpeed Ulysses).
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn import functional

from gaugeblock.optimized.distributed.collectives import AllToAll, GatherParts


def attention_over_ranks(heads: torch.Tensor, group: dist.ProcessGroup, places: Sequence[int] | None = None) -> torch.Tensor:
    """Let the tokens of this rank attend to those of all ranks.

    Args:
        heads: [3, batch_size, num_heads, tokens of this rank, features], queries, keys and values of all heads, which the ranks
            divide.
        group: The ranks.
        places: Of all ranks' tokens, those that count, as `places_of_tokens` has them; None for all. Of the others, all results
            and gradients are 0.

    Returns:
        [batch_size, num_heads, tokens of this rank, features].
    """
    of_all = AllToAll.apply(heads, 2, 3, group)
    if places is None or len(places) == of_all.shape[3]:
        attended = functional.scaled_dot_product_attention(*of_all.unbind())
    else:
        counted = torch.tensor(places, device=heads.device)
        attended_there = functional.scaled_dot_product_attention(*of_all.index_select(3, counted).unbind())
        attended = torch.zeros_like(of_all[0]).index_copy(2, counted, attended_there)
    return AllToAll.apply(attended, 2, 1, group)


def filled_up(tokens: torch.Tensor, ranks: int) -> torch.Tensor:
    """Fill [batch_size, num_tokens, features] up with zeros, to a number of tokens that the ranks divide."""
    return functional.pad(tokens, (0, 0, 0, -tokens.shape[1] % ranks))


def places_of_tokens(lengths: Sequence[int], ranks: int) -> list[int]:
    """Where streams' own tokens lie, if each rank has its part of each stream, filled up, one after the other."""
    places: list[int] = []
    begin = 0
    for rank in range(ranks):
        for length in lengths:
            share = -(-length // ranks)
            places += range(begin, begin + min(max(length - rank * share, 0), share))
            begin += share
    return places


def own_tokens(tokens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the tokens of this rank, of [batch_size, num_tokens, ...]; the ranks divide their number."""
    return tokens.chunk(dist.get_world_size(group), 1)[dist.get_rank(group)]


def all_tokens(tokens: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather the tokens of all ranks, in their order; every rank computes the same of them, and gives the same gradient."""
    return GatherParts.apply(tokens, 1, group)
