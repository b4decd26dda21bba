"""The training step, simulated: draws, microbatches, gradients, clipping and AdamW, each written out and overridable.

The model itself is the reference's.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import DiTConfig, ImageDiffusionConfig, MMDiTConfig
from gaugeblock.reference.torch import dit, image_models, mmdit, random, training
from gaugeblock.reference.torch.train_image_diffusion import Metrics, Tensors

CLIPPING_EPSILON = 1e-6


class Trainer:
    """`train_image_diffusion.train_step`."""

    contract = "train_image_diffusion.train_step"
    claims: ClassVar[dict[str, Any]] = {"dtypes": ("float32",)}

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

    # ------------------------------------------------------------------------------------------------------ gradients

    def gradients(
        self, parameters: Tensors, images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Tensors]:
        """The loss of a batch and its gradients, of one microbatch after the other."""
        trained = {name: each.detach().requires_grad_() for name, each in parameters.items() if name not in self.frozen()}
        leaves, loss = parameters | trained, torch.zeros(())
        total = {name: torch.zeros_like(each) for name, each in trained.items()}
        for chosen in self.microbatches(len(images)):
            losses = self.losses(leaves, images[chosen], labels[chosen], example_ids[chosen], step)
            share = self.share(losses, len(images))
            found = torch.autograd.grad(share, list(trained.values()), materialize_grads=True)
            loss = loss + share.detach()
            total = {name: self.accumulate(total[name], each) for name, each in zip(trained, found, strict=True)}
        return loss, total

    def frozen(self) -> tuple[str, ...]:
        """Names of what is not trained."""
        return image_models.frozen_names(self.model)

    def microbatches(self, batch_size: int) -> list[torch.Tensor]:
        """Which examples each holds."""
        return list(torch.arange(batch_size).tensor_split(max(1, min(self.config.accumulation_steps, batch_size))))

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

    def share(self, losses: torch.Tensor, batch_size: int) -> torch.Tensor:
        """A microbatch's part of the mean loss of the batch."""
        return losses.sum() / batch_size

    def accumulate(self, total: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """One more microbatch's gradient."""
        return total + gradient

    def reduce(self, loss: torch.Tensor, gradients: Tensors) -> tuple[torch.Tensor, Tensors]:
        """Those of all ranks."""
        return loss, gradients

    # --------------------------------------------------------------------------------------------------------- update

    def norm(self, gradients: Tensors) -> torch.Tensor:
        """Of all gradients together."""
        return torch.cat([each.double().flatten() for each in gradients.values()]).norm().float()

    def check(self, step: torch.Tensor, loss: torch.Tensor, gradients: Tensors, norm: torch.Tensor) -> None:
        """Raises where a number is not finite."""
        training.require_finite(step, {"loss": loss}, gradients, norm)

    def clip(self, gradients: Tensors, norm: torch.Tensor) -> Tensors:
        """Gradients of at most the largest norm."""
        factor = (self.config.max_gradient_norm / (norm + CLIPPING_EPSILON)).clamp(max=1)
        return {name: factor * each for name, each in gradients.items()}

    def report(self, loss: torch.Tensor, norm: torch.Tensor) -> Metrics:
        """What is told of a step."""
        return Metrics(loss, torch.zeros_like(loss), norm)

    def update(self, state: Mapping[str, torch.Tensor], gradients: Tensors) -> Tensors:
        """The optimizer, then the average."""
        parts = {part: self.part(state, part) for part in self.config.parts}
        before, step = dict(parts["model"]), self.next_step(state["step"])
        for name, gradient in gradients.items():
            self.update_one({part: tensors for part, tensors in parts.items() if part != "ema"}, name, gradient, step)
        if self.config.ema is not None:
            keep = self.kept_by_average(int(state["step"]) + 1)
            averaged = self.averaged(before, parts["model"])
            parts["ema"] = {name: keep * each + (1 - keep) * averaged[name] for name, each in parts["ema"].items()}
        return training.join_state(parts, state["step"] + 1)

    def update_one(self, parts: Mapping[str, Tensors], name: str, gradient: torch.Tensor, step: int) -> None:
        """Of one parameter and its moments."""
        config, parameters = self.config, parts["model"]
        gradient = self.penalize(name, gradient, parameters[name])
        if config.optimizer == "sgd":
            buffer = parts["momentum_buffer"]
            buffer[name] = self.momentum() * buffer[name] + gradient
            parameters[name] = parameters[name] - self.rate(step) * buffer[name]
            return
        first, second = parts["exp_avg"], parts["exp_avg_sq"]
        first[name] = first[name] + (1 - config.beta1) * (gradient - first[name])
        second[name] = config.beta2 * second[name] + (1 - config.beta2) * gradient * gradient
        corrected = self.correct(first[name], config.beta1, step)
        root = self.root(self.correct(second[name], config.beta2, step))
        parameters[name] = self.decay(name, parameters[name], step) - self.rate(step) * corrected / root

    def rate(self, step: int) -> float:
        """The learning rate of the update of that number, counted from 1."""
        return self.config.learning_rate * self.warm(step - 1) * self.fall(step - 1)

    def warm(self, updates: int) -> float:
        """What part of the learning rate there is after so many updates."""
        return min(1.0, updates / self.config.num_warmup_steps) if self.config.num_warmup_steps else 1.0

    def fall(self, updates: int) -> float:
        """What part of it is left after so many updates."""
        config = self.config
        if config.learning_rate_schedule == "constant":
            return 1.0
        assert config.num_training_steps is not None
        done = (updates - config.num_warmup_steps) / (config.num_training_steps - config.num_warmup_steps)
        done = min(max(done, 0.0), 1.0)
        return 1 - done if config.learning_rate_schedule == "linear" else math.cos(math.pi / 2 * done) ** 2

    def momentum(self) -> float:
        """Of SGD."""
        return self.config.momentum

    def kept_by_average(self, step: int) -> float:
        """What the average keeps of itself at the update of that number, counted from 1."""
        ema = self.config.ema
        assert ema is not None
        since = step - ema.update_after_step - 1
        if since <= 0:
            return 0.0
        grown = 1 - (1 + since / ema.inv_gamma) ** -ema.power if ema.warmup else (1 + since) / (10 + since)
        return max(ema.min_decay, min(ema.decay, grown))

    def averaged(self, before: Tensors, after: Tensors) -> Tensors:
        """Which parameters the average takes in."""
        return after

    def part(self, state: Mapping[str, torch.Tensor], part: str) -> Tensors:
        """The parameters, or their moments."""
        return training.part_of_state(state, part)

    def next_step(self, step: torch.Tensor) -> int:
        """The updates made, with this one."""
        return int(step) + 1

    def penalize(self, name: str, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Weight decay in the gradient: none of AdamW's."""
        return gradient if self.config.optimizer == "adamw" else gradient + self.config.weight_decay * parameter

    def decay(self, name: str, parameter: torch.Tensor, step: int) -> torch.Tensor:
        """Weight decay beside the gradient: AdamW's alone."""
        kept = 1 - self.rate(step) * self.config.weight_decay
        return parameter * kept if self.config.optimizer == "adamw" else parameter

    def correct(self, moment: torch.Tensor, beta: float, step: int) -> torch.Tensor:
        """A moment as if it had not begun at 0."""
        return moment / (1 - beta**step)

    def root(self, second: torch.Tensor) -> torch.Tensor:
        """What the first moment is divided by."""
        return second.sqrt() + self.config.adam_epsilon


class TrainerOnTexts(Trainer):
    """`train_image_diffusion.train_step_on_texts` of an MMDiT; a label is its example's place in the batch."""

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
        assert isinstance(self.model, MMDiTConfig)
        texts, pooled = labels
        return mmdit.mmdit(parameters, noised, texts, pooled, timesteps, config=self.model)
