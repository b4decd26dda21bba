"""Experts, simulated: routed rows in blocks of one expert, tiles of products, float32 accumulators."""

from collections.abc import Iterator

import torch

from gaugeblock.reference import validation


class RoutedExperts:
    """Two products of routed rows, sorted by expert, in blocks of one expert each; float32 accumulators."""

    rows, columns, depth = 16, 64, 32  # of a tile: of the result, and products summed at a time

    def compute(
        self,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted outputs of each token's experts, added up."""
        top_k, matrices = topk_ids.shape[1], list(zip(w13.float().unbind(), w2.float().unbind(), strict=True))
        rows, offsets = self.dispatch(topk_ids, len(matrices))
        outs = self.allocate(len(rows), hidden_states.shape[1])
        # an empty batch has one empty block, so that gradients reach every input
        for expert, start, end in list(self.blocks(offsets)) or [(0, 0, 0)]:
            routed = rows[start:end]
            hidden = self.gather(hidden_states.float(), routed // top_k)
            weights = topk_weights.flatten()[routed]
            outs = self.scatter(outs, routed, self.expert(hidden, *matrices[expert], weights, hidden_states.dtype))
        return self.store(self.combine(outs.view(*topk_ids.shape, outs.shape[1]), topk_weights), hidden_states)

    def dispatch(self, topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The routed row at each position, sorted by expert, and where each expert's positions begin, `[E + 1]`."""
        ids = topk_ids.flatten().long()
        return ids.argsort(stable=True), torch.nn.functional.pad(ids.bincount(minlength=num_experts).cumsum(0), (1, 0))

    def allocate(self, rows: int, columns: int) -> torch.Tensor:
        """Memory for the experts' outputs, not written yet."""
        return torch.empty(rows, columns)

    def blocks(self, offsets: torch.Tensor) -> Iterator[tuple[int, int, int]]:
        """Runs `(expert, start, end)` of at most `rows` positions of one expert."""
        for expert, (first, last) in enumerate(zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True)):
            for start in range(first, last, self.rows):
                yield expert, start, min(start + self.rows, last)

    def gather(self, hidden_states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """A full tile of rows; those behind the last token are zeros."""
        return torch.nn.functional.pad(hidden_states[tokens], (0, 0, 0, self.rows - len(tokens)))

    def expert(
        self, hidden: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The outputs of one block, without router weights; what the second product gets is rounded to `dtype`."""
        return self.matmul(self.activation(self.matmul(hidden, w13)).to(dtype).float(), w2)

    def activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        """What the second product gets of the first."""
        return self.activate(*self.split(gate_up))

    def split(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gate and up."""
        return gate_up.chunk(2, 1)

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Of gate and up."""
        return torch.nn.functional.silu(gate) * up

    def matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`left @ right.T` in float32, tile by tile."""
        return torch.cat([self.accumulate(left, columns) for columns in right.split(self.columns)], 1)

    def accumulate(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The sum over the tiles of one result."""
        total = torch.zeros(len(left), len(right))
        for left_tile, right_tile in self.tiles(left, right):
            total = self.add(total, self.dot(left_tile, right_tile))
        return total

    def tiles(self, left: torch.Tensor, right: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is multiplied, and in which order."""
        return list(zip(left.split(self.depth, 1), right.split(self.depth, 1), strict=True))

    def dot(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The product of one tile."""
        return (left.double() @ right.double().mT).float()

    def add(self, total: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """One step of the accumulator."""
        return total + product

    def scatter(self, outs: torch.Tensor, routed: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Writes a block's rows to their places; rows behind the last token are not stored."""
        outs[routed] = out[: len(routed)]
        return outs

    def combine(self, outs: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums over the choices of each token, `[T, k, H]` to `[T, H]`, in their order."""
        total = torch.zeros(outs.shape[0], outs.shape[2])
        for choice in range(outs.shape[1]):
            total = total + topk_weights[:, choice, None].float() * outs[:, choice]
        return total

    def store(self, total: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """What is returned."""
        return total.to(hidden_states.dtype)


class Experts(RoutedExperts):
    """`experts.fused_swiglu`."""

    contract = "experts.fused_swiglu"

    def __call__(
        self,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        self.validate(hidden_states, w13, w2, topk_weights, topk_ids)
        return self.compute(hidden_states, w13, w2, topk_weights, topk_ids)

    def validate(self, *inputs: torch.Tensor) -> None:
        """Raises what the contract demands."""
        validation.fused_swiglu(*inputs)
        validation.expert_ids_in_range(inputs[4], num_experts=len(inputs[1]))
