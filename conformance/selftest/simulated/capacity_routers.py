"""Routers whose experts have room for so many tokens, simulated: the simulated choice, and places counted block by block."""

import torch

from gaugeblock.conformance.selftest.simulated.routers import SoftmaxRouter
from gaugeblock.reference import validation
from gaugeblock.reference.torch.capacity_routers import expert_capacity

BLOCK = 64  # tokens whose places are counted at once


class SwitchRouter(SoftmaxRouter):
    """`capacity_routers.switch_top1`."""

    contract = "capacity_routers.switch_top1"

    def __call__(  # type: ignore[override]
        self, router_logits: torch.Tensor, *, capacity_factor: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        validation.switch_top1(router_logits, capacity_factor)
        tokens, experts = router_logits.shape
        scores = self.scores(self.load(router_logits))
        ids = self.select(self.choosable(scores, experts), 1)
        places = self.places(ids[:, 0], experts, scores)
        dropped = self.dropped(places, self.capacity(tokens, experts, capacity_factor), ids[:, 0])
        return self.keep(self.weigh(scores, ids, False)[:, 0], dropped), *self.returned(ids[:, 0], dropped)

    def capacity(self, tokens: int, experts: int, capacity_factor: float) -> int:
        """Tokens that an expert has room for."""
        return expert_capacity(tokens, experts, capacity_factor)

    def places(self, ids: torch.Tensor, experts: int, scores: torch.Tensor) -> torch.Tensor:
        """How many tokens before each have chosen its expert, `[T]`."""
        counts = self.no_counts(experts)
        places = []
        for block in ids.split(BLOCK) if len(ids) else ():
            chosen = torch.nn.functional.one_hot(block, experts).to(counts.dtype)
            before = chosen.cumsum(0) - chosen + counts
            places.append(before.gather(1, block[:, None])[:, 0])
            counts = self.carried(counts, chosen)
        return torch.cat(places) if places else ids

    def no_counts(self, experts: int) -> torch.Tensor:
        """Counts of no tokens."""
        return torch.zeros(experts, dtype=torch.int64)

    def carried(self, counts: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Counts of the blocks so far."""
        return counts + chosen.sum(0)

    def dropped(self, places: torch.Tensor, capacity: int, ids: torch.Tensor) -> torch.Tensor:
        """Which tokens come too late."""
        return places >= capacity

    def keep(self, weights: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        """The weights of those that do not."""
        return torch.where(dropped, 0.0, weights)

    def returned(self, ids: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is returned of ids and of what is dropped."""
        return ids, dropped
