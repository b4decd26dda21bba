"""The block diffusion training step, simulated: times, masks, weights, losses and means, each written out and overridable.

The models themselves are the references'.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gaugeblock.conformance.selftest.simulated.training import Run
from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import BlockDiffusionConfig, DreamConfig, LLaDAConfig
from gaugeblock.reference.torch import dream, language_models, llada, random, sdar, training
from gaugeblock.reference.torch.train_block_diffusion import Metrics, Tensors

Ids = torch.Tensor


class BlockTrainer(Run):
    """`train_block_diffusion.train_step`."""

    contract = "train_block_diffusion.train_step"
    claims: ClassVar[dict[str, Any]] = {"dtypes": ("float32",)}
    config: BlockDiffusionConfig

    def __call__(
        self,
        state: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        sample_ids: torch.Tensor,
        example_ids: torch.Tensor,
        *,
        config: BlockDiffusionConfig,
    ) -> tuple[Tensors, Metrics]:
        self.config, self.model = config, config.model
        batch = input_ids, labels, sample_ids, example_ids
        validation.block_diffusion_step(state, *batch, config, language_models.state_shapes(self.model))
        step, self.whole = int(state["step"]), batch
        trained = training.trained_names(state, config)
        loss, gradients = self.add_up(training.part_of_state(state, "model"), trained, batch, step)
        norm = self.norm(gradients)
        self.check(state["step"], loss, gradients, norm)
        return self.update(state, self.clip(gradients, norm)), Metrics(loss, norm)

    def losses(self, parameters: Tensors, *batch: Any) -> torch.Tensor:
        """Of each example, `[B]`: its sum over the number of the whole batch."""
        ids, labels, samples, examples, step = batch
        masked, shares = self.masked(labels, samples, examples, step)
        noisy = torch.where(masked, self.model.mask_token_id, ids.long())
        surprise = self.surprise(self.logits(parameters, noisy, self.clean(ids.long(), noisy), samples), labels.long())
        weighted = self.kept(torch.where(masked, self.weights(shares, masked, samples) * surprise, 0), noisy, labels, samples)
        return (weighted / self.own(masked, labels, samples)).sum(1) / self.number(batch)

    def share(self, losses: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Losses are divided already."""
        return losses.sum()

    # -------------------------------------------------------------------------------------------------- times and masks

    def key(self, examples: Ids, step: int) -> dict[str, Any]:
        """Of draws."""
        return {"seed": self.config.seed, "step": step, "example": examples}

    def masked(self, labels: Ids, samples: Ids, examples: Ids, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens are masked, and with which probability, both `[B, S]`."""
        key = self.key(examples, step)
        shares = self.shares(self.times(samples, key))
        return self.chosen(self.uniforms(samples, key), shares) & self.has_label(labels, samples), shares

    def uniforms(self, samples: Ids, key: dict[str, Any]) -> torch.Tensor:
        """By which tokens are masked."""
        return random.uniform((samples.shape[1],), **key, purpose=purposes.MASKED_TOKENS)

    def chosen(self, uniforms: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Whether a token is masked, if it has a label."""
        return uniforms < shares

    def times(self, samples: Ids, key: dict[str, Any]) -> torch.Tensor:
        """Of each token, `[B, S]` in [0, 1)."""
        drawn = random.uniform((samples.shape[1],), **key, purpose=purposes.MASK_TIMES)
        times = torch.zeros_like(drawn)
        for row, of_row in enumerate(samples.tolist()):
            units = self.units(of_row)
            order = list(dict.fromkeys(unit for unit, sample in zip(units, of_row, strict=True) if sample >= 0))
            for place, unit in enumerate(units):
                if self.config.antithetic and of_row[place] >= 0:
                    first = drawn[row, units.index(order[0])]
                    times[row, place] = self.spread(first, order.index(unit), len(order), row)
                else:
                    times[row, place] = drawn[row, units.index(unit)]
        return times

    def units(self, of_row: list[int]) -> list[Any]:
        """Of what in its sequence each token has the time."""
        match self.config.times_of:
            case "sequence":
                return [sample < 0 for sample in of_row]
            case "sample":
                return list(of_row)
        return [(sample, self.place(of_row, place) // self.block_length()) for place, sample in enumerate(of_row)]

    def place(self, of_row: list[int], place: int) -> int:
        """Of a token in its sample."""
        return of_row[:place].count(of_row[place])

    def block_length(self) -> int:
        """Of the model."""
        assert not isinstance(self.model, LLaDAConfig | DreamConfig)
        return self.model.block_length

    def spread(self, first: torch.Tensor, index: int, count: int, row: int) -> torch.Tensor:
        """The time of one of so many; `row` is its sequence's place in the microbatch."""
        ticks = 2**24
        return ((first.double() * ticks + index * (ticks // count)) % ticks / ticks).float()

    def shares(self, times: torch.Tensor) -> torch.Tensor:
        """With which probability tokens are masked."""
        return self.config.least_share + (self.config.greatest_share - self.config.least_share) * times

    def has_label(self, labels: Ids, samples: Ids) -> torch.Tensor:
        """Which tokens may be masked."""
        return (labels >= 0) & (samples >= 0)

    # --------------------------------------------------------------------------------------------------------- losses

    def clean(self, ids: Ids, noisy: Ids) -> Ids:
        """What is given as the clean copy."""
        return ids

    def logits(self, parameters: Tensors, noisy: Ids, clean: Ids, samples: Ids) -> torch.Tensor:
        """Of the token at each place, `[B, S, V]`."""
        match self.model:
            case LLaDAConfig():
                return llada.llada(parameters, noisy, self.seen(samples), config=self.model)
            case DreamConfig():
                return self.shifted(dream.dream(parameters, noisy, self.seen(samples), config=self.model))
            case _:
                return sdar.sdar_training(parameters, noisy, clean, self.packed(samples), config=self.model)

    def seen(self, samples: Ids) -> torch.Tensor:
        """Which tokens are no padding."""
        return samples >= 0

    def packed(self, samples: Ids) -> Ids:
        """Which tokens see each other."""
        return samples

    def shifted(self, logits: torch.Tensor) -> torch.Tensor:
        """Dream's, which are shifted already."""
        return logits

    def surprise(self, logits: torch.Tensor, labels: Ids) -> torch.Tensor:
        """The cross-entropy of each token, `[B, S]`."""
        if self.config.excludes_mask_token:
            logits = self.without_mask(logits)
        return torch.logsumexp(logits, -1) - logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]

    def without_mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits by which the mask token has no probability."""
        lowered = logits.clone()
        lowered[..., self.model.mask_token_id] -= 1e6
        return lowered

    def weights(self, shares: torch.Tensor, masked: torch.Tensor, samples: Ids) -> torch.Tensor:
        """What losses are multiplied by, `[B, S]`."""
        match self.config.weighting:
            case "inverse":
                return self.inverse(shares)
            case "linear":
                return self.linear(shares)
            case "cart":
                return self.cart(masked, samples)
        return torch.ones_like(shares)

    def inverse(self, shares: torch.Tensor) -> torch.Tensor:
        """One over the probability; of what is never masked it is not asked for."""
        return 1 / shares.clamp(min=2**-24)

    def linear(self, shares: torch.Tensor) -> torch.Tensor:
        """What is not masked."""
        return 1 - shares

    def cart(self, masked: torch.Tensor, samples: Ids) -> torch.Tensor:
        """How near seen tokens are."""
        weights = torch.zeros(masked.shape)
        for row, of_row in enumerate(samples.tolist()):
            for one in range(len(of_row)):
                for other in range(len(of_row)):
                    if self.is_near(one, other, of_row, masked[row]):
                        weights[row, one] += self.near(abs(one - other))
        return weights

    def is_near(self, one: int, other: int, of_row: list[int], masked: torch.Tensor) -> bool:
        """Whether a token counts for another."""
        return one != other and of_row[one] == of_row[other] and not masked[other]

    def near(self, distance: int) -> float:
        """How much it does."""
        return 0.5 * self.config.cart_p * (1 - self.config.cart_p) ** (distance - 1)

    def kept(self, losses: torch.Tensor, noisy: Ids, labels: Ids, samples: Ids) -> torch.Tensor:
        """Losses of tokens that count, `[B, S]`."""
        return losses

    # ---------------------------------------------------------------------------------------------------------- means

    def own(self, masked: torch.Tensor, labels: Ids, samples: Ids) -> torch.Tensor | int:
        """What each example's losses are divided by, `[B, 1]`."""
        if self.config.mean_over != "examples":
            return 1
        return self.has_label(labels, samples).sum(1, keepdim=True).clamp(min=1)

    def number(self, microbatch: tuple[Any, ...]) -> int:
        """What all losses are divided by: a number of the whole batch."""
        return self.number_of(self.whole, microbatch[-1])

    def number_of(self, batch: tuple[Any, ...], step: int) -> int:
        """What the losses of a batch are divided by."""
        _, labels, samples, examples = batch[:4]
        match self.config.mean_over:
            case "tokens":
                return max(1, int(self.has_label(labels, samples).sum()))
            case "masked":
                return max(1, int(self.masked(labels, samples, examples, step)[0].sum()))
        return len(labels)
