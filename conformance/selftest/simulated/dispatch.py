"""Dispatch, simulated: rows are counted, placed, gathered and summed as kernels do it."""

from typing import ClassVar

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.dispatch import most_blocks


class Sort:
    """`dispatch.sort_by_expert`."""

    contract = "dispatch.sort_by_expert"
    claims: ClassVar = {"dtypes": ("float32",)}

    def __call__(self, topk_ids: torch.Tensor, *, num_experts: int) -> tuple[torch.Tensor, ...]:
        self.validate(topk_ids, num_experts)
        ids = self.ids(topk_ids)
        sizes = self.sizes(ids, num_experts)
        places = self.starts(sizes)[ids] + self.ranks(ids)
        return self.order(places), places.reshape(topk_ids.shape), sizes

    def validate(self, topk_ids: torch.Tensor, num_experts: int) -> None:
        """Raises what the contract demands."""
        validation.sort_by_expert(topk_ids, num_experts)
        validation.expert_ids_in_range(topk_ids, num_experts=num_experts)

    def ids(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Of each routed row, `[N]`."""
        return topk_ids.flatten().long()

    def sizes(self, ids: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Rows of each expert, `[E]`."""
        return ids.bincount(minlength=num_experts)

    def starts(self, sizes: torch.Tensor) -> torch.Tensor:
        """Where each expert's rows begin, `[E]`."""
        return sizes.cumsum(0) - sizes

    def ranks(self, ids: torch.Tensor) -> torch.Tensor:
        """How many rows of the same expert come before each row, `[N]`."""
        return (ids[:, None] == ids[None, :]).tril(-1).sum(1)

    def order(self, places: torch.Tensor) -> torch.Tensor:
        """The row at each place, `[N]`."""
        return torch.zeros_like(places).scatter(0, places, torch.arange(len(places)))


class Align(Sort):
    """`dispatch.align_to_blocks`."""

    contract = "dispatch.align_to_blocks"

    def __call__(self, topk_ids: torch.Tensor, *, num_experts: int, block_size: int) -> tuple[torch.Tensor, ...]:
        validation.align_to_blocks(topk_ids, num_experts, block_size)
        self.validate(topk_ids, num_experts)
        ids = self.ids(topk_ids)
        padded = self.padded(self.sizes(ids, num_experts), block_size)
        places = self.starts(padded)[ids] + self.ranks(ids)
        blocks = most_blocks(len(ids), num_experts, block_size)
        rows = torch.full((blocks * block_size,), self.sentinel(topk_ids)).scatter(0, places, torch.arange(len(ids)))
        experts = torch.arange(num_experts).repeat_interleave(padded // block_size)
        needless = torch.full((blocks - len(experts),), self.no_expert(num_experts))
        return rows, torch.cat([experts, needless]), padded.sum()

    def padded(self, sizes: torch.Tensor, block_size: int) -> torch.Tensor:
        """Places of each expert, `[E]`."""
        return -(-sizes // block_size) * block_size

    def sentinel(self, topk_ids: torch.Tensor) -> int:
        """What padding holds."""
        return topk_ids.numel()

    def no_expert(self, num_experts: int) -> int:
        """The expert of a block that is not needed."""
        return -1


class Permute:
    """`dispatch.permute`."""

    contract = "dispatch.permute"

    def __call__(self, hidden_states: torch.Tensor, order: torch.Tensor, *, top_k: int) -> torch.Tensor:
        self.validate(hidden_states, order, top_k)
        return self.gather(hidden_states, self.tokens(order.long(), top_k))

    def validate(self, hidden_states: torch.Tensor, order: torch.Tensor, top_k: int) -> None:
        """Raises what the contract demands."""
        validation.permute(hidden_states, order, top_k)
        validation.routed_rows_in_range(order, num_rows=hidden_states.shape[0] * top_k)

    def tokens(self, order: torch.Tensor, top_k: int) -> torch.Tensor:
        """Of each place, `[N]`."""
        return order // top_k

    def gather(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Gradients are added up in float32."""
        return hidden_states.float().index_select(0, tokens).to(hidden_states.dtype)


class Unpermute:
    """`dispatch.unpermute`."""

    contract = "dispatch.unpermute"

    def __call__(self, rows: torch.Tensor, inverse: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        self.validate(rows, inverse, topk_weights)
        summands = [self.weighted(row, weight) for row, weight in self.pairs(rows, inverse.long(), topk_weights)]
        return self.sum(summands).to(rows.dtype) if summands else rows.new_zeros(len(inverse), rows.shape[1])

    def validate(self, rows: torch.Tensor, inverse: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """Raises what the contract demands."""
        validation.unpermute(rows, inverse, topk_weights)
        validation.places_in_range(inverse, num_rows=rows.shape[0])

    def pairs(self, rows: torch.Tensor, inverse: torch.Tensor, weights: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Rows `[T, H]` and weights `[T, 1]` of each choice; the gradients of a row that comes twice are added in float32."""
        rows = rows.float()
        return [(rows[inverse[:, choice]], weights[:, choice, None]) for choice in range(inverse.shape[1])]

    def weighted(self, row: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """In float32."""
        return row.float() * weight.float()

    def sum(self, summands: list[torch.Tensor]) -> torch.Tensor:
        """One after the other."""
        return sum(summands[1:], summands[0])
