"""Routers whose experts have room for so many tokens, simulated: the simulated choice, and places counted block by block."""

import torch

from gaugeblock.conformance.selftest.simulated.routers import SoftmaxRouter
from gaugeblock.reference import validation
from gaugeblock.reference.configs import SMALLEST_WEIGHT_SUM, SecondExpertPolicy
from gaugeblock.reference.torch.capacity_routers import chosen_tokens, expert_capacity

LOWEST = torch.finfo(torch.float32).min
BLOCK = 64  # tokens whose places are counted at once


class SwitchRouter(SoftmaxRouter):
    """`capacity_routers.switch_top1`."""

    contract = "capacity_routers.switch_top1"

    def __call__(self, router_logits: torch.Tensor, *, capacity_factor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


class GshardRouter(SwitchRouter):
    """`capacity_routers.gshard_top2`: what is not asked for room stands behind the last expert."""

    contract = "capacity_routers.gshard_top2"

    def __call__(
        self,
        router_logits: torch.Tensor,
        noise: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        second_expert_policy: SecondExpertPolicy,
        normalize_before_dropping: bool,
        capacity_factor: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        validation.gshard_top2(router_logits, noise, attention_mask, second_expert_policy, capacity_factor)
        tokens, experts = router_logits.shape
        self.policy, self.normalizes_before = second_expert_policy, normalize_before_dropping
        logits = self.load(self.unpadded(router_logits, attention_mask))
        scores = self.scores(logits)
        ids = self.two(scores, self.noisy(logits.detach(), noise), experts)
        weights = self.before_dropping(scores.gather(1, ids))
        asks = self.asks(weights.detach(), noise, ids, attention_mask)
        places = self.places_of_all(torch.where(asks, ids, experts), experts + 1, scores)
        dropped = ~asks | self.dropped(places, self.capacity(tokens, experts, capacity_factor), ids)
        return self.after_dropping(self.keep(weights, dropped)), *self.returned(ids, dropped)

    def unpadded(self, logits: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits in which padding is 0."""
        return torch.where(attention_mask[:, None], logits, 0)

    def noisy(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """By what the second is chosen; lanes without an expert stay at -inf."""
        lanes = torch.nn.functional.pad(noise.float(), (0, logits.shape[1] - noise.shape[1]))
        return logits + lanes if self.policy == "sampling" else logits

    def two(self, scores: torch.Tensor, noisy: torch.Tensor, experts: int) -> torch.Tensor:
        """The first and the second, `[T, 2]`."""
        first = self.best(self.choosable(scores, experts))
        others = self.choosable(noisy.clamp(min=LOWEST), experts)  # above what is taken, even if it is -inf
        return torch.cat([first, self.best(self.take(others, first))], 1)

    def before_dropping(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of two experts, as the option says."""
        return weights / self.sum(weights) if self.normalizes_before else weights

    def asks(self, weights: torch.Tensor, noise: torch.Tensor, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Which experts are asked for room, `[T, 2]`."""
        asks = attention_mask[:, None].repeat(1, 2)
        if self.policy == "random":
            asks[:, 1] &= self.drawn(weights[:, 1], noise.gather(1, ids)[:, 1])
        return asks

    def drawn(self, weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Whether the draw lets the second expert be asked."""
        return 2 * weights > noise

    def places_of_all(self, ids: torch.Tensor, experts: int, scores: torch.Tensor) -> torch.Tensor:
        """Places `[T, 2]`, those of all first ones before those of the second ones."""
        return self.places(ids.T.flatten(), experts, scores).view(2, len(ids)).T

    def after_dropping(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of what is kept, as the option says."""
        return weights if self.normalizes_before else weights / self.divisor(weights)

    def divisor(self, weights: torch.Tensor) -> torch.Tensor:
        """What they are divided by."""
        return self.sum(weights).clamp(min=SMALLEST_WEIGHT_SUM)


class ChoosingExperts(SoftmaxRouter):
    """`capacity_routers.expert_choice`: the best lane of a row of tokens, as often as there is room."""

    contract = "capacity_routers.expert_choice"

    def __call__(self, router_logits: torch.Tensor, *, capacity_factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        validation.expert_choice(router_logits, capacity_factor)
        tokens, experts = router_logits.shape
        probabilities = self.scores(self.load(router_logits))[:, :experts].T
        ids = self.choose(probabilities.detach(), self.count(tokens, experts, capacity_factor))
        return self.store(self.weigh(probabilities, ids, False), ids, router_logits)

    def count(self, tokens: int, experts: int, capacity_factor: float) -> int:
        """Tokens that an expert chooses."""
        return chosen_tokens(tokens, experts, capacity_factor)

    def choose(self, probabilities: torch.Tensor, count: int) -> torch.Tensor:
        """Ids of tokens, `[E, count]`."""
        return self.select(probabilities, count) if count else torch.zeros(len(probabilities), 0, dtype=torch.int64)
