"""Pieces of tensor-parallel models: parameters in parts, and pairs of linear layers with one sum over the ranks each way.

Every rank has all tokens. It has some rows of a pair's first layer (some heads, some features of the hidden layer) and the
columns of the second that multiply them:

    inputs = gradients_summed(tokens, group)                        backward: one sum over the ranks
    inner = anything of each head or feature by itself of (inputs @ first_weight.T + first_bias)
    out = summed_linear(inner, second_weight, second_bias, group)   forward: one sum over the ranks, then the bias

A block with several streams of tokens (joint attention) gives all streams to one `gradients_summed`, and all second layers to one
`summed_linears`, so that they travel together. What is whole on every rank, but meets its heads alone (the weights of norms of
queries and keys), goes with the tokens through `gradients_summed`. Sums are float32 at least, and added up in the order of the
ranks (`collectives.py`): the bits are the same on every rank.

Source: Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.distributed.collectives import SumOfGradients, SumOverRanks
from gaugeblock.optimized.partition_rules import Cut, Rules
from gaugeblock.reference.torch.precision import at_least_float32


def gradients_summed(group: dist.ProcessGroup, *tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return tokens that every rank has alike, for first layers; their gradients are added up over the ranks."""
    return SumOfGradients.apply(group, *tokens)


def summed_linear(inner: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: dist.ProcessGroup) -> torch.Tensor:
    """Multiply the features of this rank by their columns of a second layer; add up the ranks' products, then the bias.

    Args:
        inner: [batch_size, num_tokens, features of this rank].
        weight: [out_features, features of this rank].
        bias: [out_features], whole on every rank; or None.
        group: The ranks.

    Returns:
        [batch_size, num_tokens, out_features], dtype as inner.
    """
    return summed_linears(group, (inner, weight, bias))[0]


def summed_linears(
    group: dist.ProcessGroup, *streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
) -> list[torch.Tensor]:
    """Do what `summed_linear` does for several streams of tokens, of as many out_features, in one exchange.

    Args:
        group: The ranks.
        streams: inner, weight and bias of each, as of `summed_linear`.
    """
    products = [at_least_float32(inner @ weight.mT) for inner, weight, _ in streams]
    rows = [each.flatten(0, 1) for each in products]
    totals = SumOverRanks.apply(torch.cat(rows) if len(rows) > 1 else rows[0], group).split([len(each) for each in rows])
    return [
        (total if bias is None else total + bias).view(product.shape).to(inner.dtype)
        for total, product, (inner, _, bias) in zip(totals, products, streams, strict=True)
    ]


def parts_of_state(state: Mapping[str, torch.Tensor], rules: Rules, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    """Cut this rank's parts out of a state that is whole on every rank, as rules say; gradients are those of the whole one.

    A training run keeps the parts alone, and needs no gradients of the whole: then this is called under `torch.no_grad`.
    """
    cuts = {name: cut for name, cut in partition_rules.cuts_of(state, rules).items() if cut is not None}
    parts = _Parts.apply(tuple(cuts.values()), group, *(state[name] for name in cuts))
    return {**state, **dict(zip(cuts, parts, strict=True))}


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cuts: Sequence[Cut], group: dist.ProcessGroup, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.cuts, ctx.group = cuts, group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        return tuple(
            partition_rules.part(each, cut, rank=rank, ranks=ranks).clone(memory_format=torch.contiguous_format)
            for each, cut in zip(tensors, cuts, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gather the parts' gradients, in one exchange."""
        mine = torch.cat([each.flatten() for each in gradients])
        of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(ctx.group))]
        dist.all_gather(of_ranks, mine, group=ctx.group)
        parts = torch.stack(of_ranks).split([each.numel() for each in gradients], dim=1)
        return (
            None,
            None,
            *(_joined(part.unflatten(1, each.shape), cut) for part, each, cut in zip(parts, gradients, ctx.cuts, strict=True)),
        )


def _joined(of_ranks: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Put all ranks' parts `[R, ...]` of a parameter together."""
    blocks = of_ranks.unflatten(1 + cut.axis, (cut.blocks, -1)).movedim(0, 1 + cut.axis)
    return blocks.flatten(cut.axis, cut.axis + 2)
