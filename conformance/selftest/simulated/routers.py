"""Right kernels, simulated in torch as they are written for a GPU: lanes, tiles, accumulators, unwritten memory.

Each stage is a method. A planted bug overrides one of them, and so says what it breaks; a right variant does the same.
A tile's product is computed in float64 and rounded to float32: its bits depend neither on the order in which a library adds
nor on the number of rows.
"""

import torch

from gaugeblock.reference import validation

TAKEN = -torch.inf  # the score of a lane that holds no expert, or one that is chosen already


class SoftmaxRouter:
    """`routers.softmax_topk`: a power of two of lanes for each token, and the best lane `top_k` times over."""

    contract = "routers.softmax_topk"

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

    contract = "routers.grouped_sigmoid_topk"

    epsilon = 1e-20

    def __call__(
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
        validation.grouped_sigmoid_topk(
            router_logits, e_score_correction_bias, top_k, num_groups, topk_groups, routed_scaling_factor
        )
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
