"""The image-diffusion training step, simulated: draws, losses and metrics, each written out and overridable.

The model itself is the reference's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch

from gaugeblock.conformance.selftest.simulated.training import Run
from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import DiTConfig, DiTMoEModelConfig, ImageDiffusionConfig
from gaugeblock.reference.torch import dit, dit_moe, image_models, random, training
from gaugeblock.reference.torch.train_image_diffusion import Metrics, Tensors


class Trainer(Run):
    """`train_image_diffusion.train_step`."""

    contract = "train_image_diffusion.train_step"
    claims: ClassVar[dict[str, Any]] = {"dtypes": ("float32",)}
    config: ImageDiffusionConfig

    def __call__(
        self,
        state: Mapping[str, torch.Tensor],
        images: torch.Tensor,
        labels: torch.Tensor,
        example_ids: torch.Tensor,
        *,
        config: ImageDiffusionConfig,
    ) -> tuple[Tensors, Metrics]:
        self.config, self.model = config, config.model
        self.validate(state, images, labels, example_ids)
        return self.step(state, images, labels, example_ids)

    def step(
        self, state: Mapping[str, torch.Tensor], images: torch.Tensor, labels: Any, example_ids: torch.Tensor
    ) -> tuple[Tensors, Metrics]:
        """Make the update."""
        parameters = training.part_of_state(state, "model")
        loss, gradients = self.gradients(parameters, images, labels, example_ids, int(state["step"]))
        loss, gradients = self.reduce(loss, gradients)
        norm = self.norm(gradients)
        self.check(state["step"], loss, gradients, norm)
        return self.update(state, self.clip(gradients, norm)), self.report(loss, norm)

    def validate(
        self, state: Mapping[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor
    ) -> None:
        """Raises what the contract demands of a call."""
        validation.image_diffusion_step(state, images, labels, example_ids, self.config, image_models.state_shapes(self.model))

    # ---------------------------------------------------------------------------------------------------------- draws

    def step_of_draws(self, step: int) -> int:
        """By which step random numbers are drawn."""
        return step

    def ids(self, example_ids: torch.Tensor) -> torch.Tensor:
        """By which examples random numbers are drawn."""
        return example_ids

    def noise(self, images: torch.Tensor, example_ids: torch.Tensor, key: dict[str, int]) -> torch.Tensor:
        """Standard normal, like images."""
        return random.normal(images.shape[1:], **key, example=example_ids, purpose=purposes.TRAINING_NOISE)

    def times(self, example_ids: torch.Tensor, key: dict[str, int]) -> torch.Tensor:
        """`[B]` in [0, 1)."""
        key, sampling = {**key, "purpose": purposes.TRAINING_TIMES}, self.config.timestep_sampling
        if sampling == "logit-normal":
            return random.normal((), **key, example=example_ids).sigmoid()
        drawn = random.uniform((), **key, example=example_ids)
        if sampling == "uniform":
            return drawn
        if sampling == "mode":
            return 1 - drawn - 1.29 * (torch.cos(torch.pi / 2 * drawn).square() - 1 + drawn)
        weights = torch.ones(1000, dtype=torch.float64)
        biased = int(1000 * self.config.bias_portion)
        weights[slice(biased) if sampling == "earlier" else slice(1000 - biased, 1000)] = self.config.bias_multiplier
        return torch.searchsorted(weights.cumsum(0), drawn.double() * weights.sum(), right=True) / 1000

    def drop(self, labels: torch.Tensor, example_ids: torch.Tensor, key: dict[str, int]) -> torch.Tensor:
        """Labels of which some are dropped."""
        drawn = random.uniform((), **key, example=example_ids, purpose=purposes.LABEL_DROPOUT)
        return torch.where(drawn < self.config.label_dropout, self.null_label(), labels.long())

    def null_label(self) -> int:
        """What stands for a dropped label."""
        assert isinstance(self.model, DiTConfig)
        return self.model.num_classes

    # --------------------------------------------------------------------------------------------------------- losses

    def gradients(
        self, parameters: Tensors, images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Tensors]:
        """The loss of a batch and its gradients, of one microbatch after the other."""
        trained = [name for name in parameters if name not in self.frozen()]
        return self.add_up(parameters, trained, (images, labels, example_ids), step)

    def frozen(self) -> tuple[str, ...]:
        """Names of what is not trained."""
        return image_models.frozen_names(self.model)

    def losses(
        self, parameters: Tensors, images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Of each example, `[B]`."""
        ids, key = self.ids(example_ids), {"seed": self.config.seed, "step": self.step_of_draws(step)}
        noise, times = self.noise(images, ids, key), self.times(ids, key)
        noised = self.interpolate(images, noise, times.view(-1, 1, 1, 1))
        predicted = self.predict(parameters, noised, self.timesteps(times), self.drop(labels, ids, key))
        return self.weights(times) * (predicted - self.target(images, noise)).square().flatten(1).mean(1)

    def predict(self, parameters: Tensors, noised: torch.Tensor, timesteps: torch.Tensor, labels: Any) -> torch.Tensor:
        """What the model says."""
        assert isinstance(self.model, DiTConfig)
        return dit.dit(parameters, noised, timesteps, labels, config=self.model)

    def interpolate(self, images: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the model sees."""
        return images + times * (noise - images)

    def timesteps(self, times: torch.Tensor) -> torch.Tensor:
        """What the model is told of the time."""
        return 1000 * times

    def velocity(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Which way the model should say that it goes."""
        return noise - images if self.config.velocity == "noise - data" else images - noise

    def target(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model should predict."""
        targets = {"epsilon": noise, "sample": images, "flow_prediction": self.velocity(images, noise)}
        return targets[self.config.prediction_type]

    def weights(self, times: torch.Tensor) -> torch.Tensor:
        """How much each example counts."""
        gamma, of_data = self.config.min_snr_gamma, (1 - times).square()
        if gamma is None:
            return torch.ones_like(times)
        ratio = self.ratio(of_data, times.square())
        if self.config.snr == "noise over data":
            return ratio.clamp(max=gamma) / ratio
        weights = {"epsilon": (gamma / ratio).clamp(max=1), "sample": ratio.clamp(max=gamma)}
        return weights.get(self.config.prediction_type, ratio.clamp(max=gamma) * times.square())

    def ratio(self, of_data: torch.Tensor, of_noise: torch.Tensor) -> torch.Tensor:
        """Of signal and noise."""
        return of_data / of_noise if self.config.snr == "data over noise" else of_noise / of_data

    def report(self, loss: torch.Tensor, norm: torch.Tensor) -> Metrics:
        """What is told of a step."""
        return Metrics(loss, torch.zeros_like(loss), norm)


class TrainerOnTexts(Trainer):
    """`train_image_diffusion.train_step_on_texts` ; a label is its example's place in the batch."""

    contract = "train_image_diffusion.train_step_on_texts"

    def __call__(
        self,
        state: Mapping[str, torch.Tensor],
        images: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        example_ids: torch.Tensor,
        *,
        config: ImageDiffusionConfig,
    ) -> tuple[Tensors, Metrics]:
        self.config, self.model, self.texts = config, config.model, (encoder_hidden_states, pooled_projections)
        shapes = image_models.state_shapes(self.model)
        validation.image_diffusion_step_on_texts(state, images, *self.texts, example_ids, config, shapes, self.frozen())
        return self.step(state, images, torch.arange(len(images)), example_ids)

    def drop(self, labels: torch.Tensor, example_ids: torch.Tensor, key: dict[str, int]) -> Any:
        """The texts, of which some are dropped."""
        drawn = random.uniform((), **key, example=example_ids, purpose=purposes.LABEL_DROPOUT)
        kept = (drawn >= self.config.label_dropout).float()
        texts, pooled = (each[labels] for each in self.texts)
        return self.dropped(texts, kept[:, None, None]), self.dropped_pooled(pooled, kept[:, None])

    def dropped(self, texts: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Texts, of which those that are not kept are dropped."""
        return texts * kept

    def dropped_pooled(self, pooled: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Pooled texts, likewise."""
        return self.dropped(pooled, kept)

    def predict(self, parameters: Tensors, noised: torch.Tensor, timesteps: torch.Tensor, labels: Any) -> torch.Tensor:
        model = partial(image_models.operation(self.model), parameters, config=self.model)
        return image_models.predict(model, noised, timesteps, None, *labels, config=self.model)[0]


class TrainerOfExperts(Trainer):
    """`train_image_diffusion.train_step` of a DiT-MoE; the whole batch is one microbatch."""

    contract = "train_image_diffusion.train_step_of_experts"

    def predict(self, parameters: Tensors, noised: torch.Tensor, timesteps: torch.Tensor, labels: Any) -> torch.Tensor:
        predicted, self.balance = self.predict_both(parameters, noised, timesteps, labels)
        return predicted

    def predict_both(
        self, parameters: Tensors, noised: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model says, and the balance of its experts' load."""
        assert isinstance(self.model, DiTMoEModelConfig)
        return dit_moe.dit_moe(parameters, noised, timesteps, labels, config=self.model)

    def share(self, losses: torch.Tensor, batch_size: int) -> torch.Tensor:
        loss = super().share(losses, batch_size)
        self.told = self.reported(loss.detach(), self.balance.detach())
        return self.objective(loss, self.balance)

    def objective(self, loss: torch.Tensor, balance: torch.Tensor) -> torch.Tensor:
        """What is differentiated."""
        return loss + balance

    def reported(self, loss: torch.Tensor, balance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is told of both."""
        return loss, balance

    def report(self, loss: torch.Tensor, norm: torch.Tensor) -> Metrics:
        return Metrics(*self.told, norm)
