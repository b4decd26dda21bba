"""Right kernels, simulated in torch as they are written for a GPU: lanes, tiles, accumulators, unwritten memory.

Each stage is a method. A planted bug overrides one of them, and so says what it breaks; a right variant does the same.
A tile's product is computed in float64 and rounded to float32: its bits depend neither on the order in which a library adds
nor on the number of rows.
"""

from collections.abc import Iterator
from typing import Any

import torch

from gaugeblock.reference import validation

TAKEN = -torch.inf  # the score of a lane that holds no expert, or one that is chosen already


class SoftmaxRouter:
    """`routers.softmax_topk`: a power of two of lanes for each token, and the best lane `top_k` times over."""

    def __call__(self, router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        self.validate(router_logits, top_k)
        experts = router_logits.shape[1]
        scores = self.scores(self.load(router_logits))
        ids = self.select(self.choosable(scores, experts), top_k)
        return self.store(self.weigh(scores, ids, renormalize), ids, router_logits)

    def validate(self, router_logits: torch.Tensor, top_k: int) -> None:
        """Raises what the contract demands."""
        validation.softmax_topk(router_logits, top_k)

    def load(self, logits: torch.Tensor) -> torch.Tensor:
        """`[T, lanes]` float32; lanes without an expert get no probability."""
        return torch.nn.functional.pad(logits.float(), (0, self.lanes(logits.shape[1]) - logits.shape[1]), value=-torch.inf)

    def lanes(self, experts: int) -> int:
        """The power of two that holds all experts."""
        return 1 << (experts - 1).bit_length()

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of all lanes."""
        exponentials = (logits - logits.detach().amax(1, keepdim=True)).double().exp().float()
        return exponentials / self.sum(exponentials)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Row sums `[T, 1]`."""
        return values.double().sum(1, keepdim=True).float()

    def choosable(self, scores: torch.Tensor, experts: int) -> torch.Tensor:
        """The scores by which lanes are chosen."""
        return scores.detach().masked_fill(torch.arange(scores.shape[1]) >= experts, TAKEN)

    def select(self, scores: torch.Tensor, top_k: int) -> torch.Tensor:
        """Ids `[T, top_k]` of the highest scores; of equal ones the lowest first, NaN above all."""
        chosen = []
        for _ in range(top_k):
            best = self.best(scores)
            scores = self.take(scores, best)
            chosen.append(best)
        return torch.cat(chosen, 1)

    def best(self, scores: torch.Tensor) -> torch.Tensor:
        """The best lane of each row, `[T, 1]`."""
        return scores.argmax(1, keepdim=True)

    def take(self, scores: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """The scores with that lane gone."""
        return scores.scatter(1, best, TAKEN)

    def weigh(self, scores: torch.Tensor, ids: torch.Tensor, renormalize: bool) -> torch.Tensor:
        """Weights of the chosen ids."""
        weights = scores.gather(1, ids)
        return weights / self.sum(weights) if renormalize else weights

    def store(self, weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is returned."""
        return weights, ids


class GroupedRouter(SoftmaxRouter):
    """`routers.grouped_sigmoid_topk`: lanes are experts; those of groups that are not kept cannot be chosen."""

    epsilon = 1e-20

    def __call__(  # type: ignore[override]
        self,
        router_logits: torch.Tensor,
        e_score_correction_bias: torch.Tensor,
        *,
        top_k: int,
        num_groups: int,
        topk_groups: int,
        renormalize: bool,
        routed_scaling_factor: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        validation.grouped_sigmoid_topk(router_logits, e_score_correction_bias, top_k, num_groups, topk_groups)
        scores = self.scores(router_logits.float())
        biased = self.biased(scores, e_score_correction_bias)
        ids = self.select(self.masked(biased, self.kept(biased, num_groups, topk_groups)), top_k)
        weights = self.weigh_groups(scores, biased, ids, renormalize, routed_scaling_factor)
        return self.store(weights, ids, router_logits)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Sigmoids of all lanes."""
        return logits.double().sigmoid().float()

    def biased(self, scores: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """What experts are chosen by."""
        return scores.detach() + bias.float()

    def kept(self, biased: torch.Tensor, num_groups: int, topk_groups: int) -> torch.Tensor:
        """Which lanes lie in the best groups, `[T, E]`."""
        members = biased.shape[1] // num_groups
        groups = self.select(self.group_scores(biased.unflatten(1, (num_groups, members))), topk_groups)
        kept = torch.zeros(len(biased), num_groups, dtype=torch.bool).scatter(1, groups, True)
        return kept.repeat_interleave(members, 1)

    def group_scores(self, biased: torch.Tensor) -> torch.Tensor:
        """Scores of groups `[T, G]` from those of their members `[T, G, M]`."""
        return biased.topk(min(2, biased.shape[2]), 2).values.double().sum(2).float()

    def masked(self, biased: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Scores of which the dropped groups' cannot be chosen."""
        return biased.masked_fill(~kept, TAKEN)

    def weigh_groups(
        self, scores: torch.Tensor, biased: torch.Tensor, ids: torch.Tensor, renormalize: bool, factor: float
    ) -> torch.Tensor:
        """Weights of the chosen ids, from the scores without bias."""
        weights = scores.gather(1, ids)
        return (weights / (self.sum(weights) + self.epsilon) if renormalize else weights) * factor


class Experts:
    """`experts.fused_swiglu`: routed rows sorted by expert, in blocks of one expert each; float32 accumulators."""

    rows, columns, depth = 16, 64, 32  # of a tile: of the result, and products summed at a time

    def __call__(
        self,
        hidden_states: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> torch.Tensor:
        self.validate(hidden_states, w13, w2, topk_weights, topk_ids)
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

    def validate(self, *inputs: torch.Tensor) -> None:
        """Raises what the contract demands."""
        validation.fused_swiglu(*inputs)
        validation.expert_ids_in_range(inputs[4], num_experts=len(inputs[1]))

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
        activation = self.activate(*self.split(self.matmul(hidden, w13)))
        return self.matmul(activation.to(dtype).float(), w2)

    def split(self, gate_up: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gate and up."""
        return gate_up.chunk(2, 1)

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What the second product gets."""
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


RIGHT: dict[str, Any] = {
    "routers.softmax_topk": SoftmaxRouter,
    "routers.grouped_sigmoid_topk": GroupedRouter,
    "experts.fused_swiglu": Experts,
}
