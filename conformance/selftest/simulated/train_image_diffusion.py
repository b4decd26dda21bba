"""The training step, simulated: draws, microbatches, gradients, clipping and AdamW, each written out and overridable.

The model itself is the reference's.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import ImageDiffusionConfig
from gaugeblock.reference.torch import dit, random
from gaugeblock.reference.torch.train_image_diffusion import Metrics, Tensors, join_state, part_of_state, require_finite

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
        self.config = config
        self.validate(state, images, labels, example_ids)
        parameters = part_of_state(state, "model")
        loss, gradients = self.gradients(parameters, images, labels, example_ids, int(state["step"]))
        loss, gradients = self.reduce(loss, gradients)
        norm = self.norm(gradients)
        self.check(state["step"], loss, gradients, norm)
        return self.update(state, self.clip(gradients, norm)), self.report(loss, norm)

    def validate(
        self, state: Mapping[str, torch.Tensor], images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor
    ) -> None:
        """Raises what the contract demands of a call."""
        model = self.config.model
        validation.image_diffusion_step(state, images, labels, example_ids, model, dit.state_shapes(model))

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
        key = {**key, "purpose": purposes.TRAINING_TIMES}
        if self.config.timestep_sampling == "uniform":
            return random.uniform((), **key, example=example_ids)
        return random.normal((), **key, example=example_ids).sigmoid()

    def drop(self, labels: torch.Tensor, example_ids: torch.Tensor, key: dict[str, int]) -> torch.Tensor:
        """Labels of which some are dropped."""
        drawn = random.uniform((), **key, example=example_ids, purpose=purposes.LABEL_DROPOUT)
        return torch.where(drawn < self.config.label_dropout, self.null_label(), labels.long())

    def null_label(self) -> int:
        """What stands for a dropped label."""
        return self.config.model.num_classes

    # ------------------------------------------------------------------------------------------------------ gradients

    def gradients(
        self, parameters: Tensors, images: torch.Tensor, labels: torch.Tensor, example_ids: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Tensors]:
        """The loss of a batch and its gradients, of one microbatch after the other."""
        leaves = {name: each.detach().requires_grad_() for name, each in parameters.items()}
        loss = torch.zeros(())
        total = {name: torch.zeros_like(each) for name, each in leaves.items()}
        for chosen in self.microbatches(len(images)):
            losses = self.losses(leaves, images[chosen], labels[chosen], example_ids[chosen], step)
            share = self.share(losses, len(images))
            found = torch.autograd.grad(share, list(leaves.values()))
            loss = loss + share.detach()
            total = {name: self.accumulate(total[name], each) for name, each in zip(leaves, found, strict=True)}
        return loss, total

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
        predicted = dit.dit(parameters, noised, self.timesteps(times), self.drop(labels, ids, key), config=self.config.model)
        return (predicted - self.velocity(images, noise)).square().flatten(1).mean(1)

    def interpolate(self, images: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """What the model sees."""
        return images + times * (noise - images)

    def timesteps(self, times: torch.Tensor) -> torch.Tensor:
        """What the model is told of the time."""
        return 1000 * times

    def velocity(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model should predict."""
        return noise - images if self.config.velocity == "noise - data" else images - noise

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
        require_finite(step, loss, gradients, norm)

    def clip(self, gradients: Tensors, norm: torch.Tensor) -> Tensors:
        """Gradients of at most the largest norm."""
        factor = (self.config.max_gradient_norm / (norm + CLIPPING_EPSILON)).clamp(max=1)
        return {name: factor * each for name, each in gradients.items()}

    def report(self, loss: torch.Tensor, norm: torch.Tensor) -> Metrics:
        """What is told of a step."""
        return Metrics(loss, norm)

    def update(self, state: Mapping[str, torch.Tensor], gradients: Tensors) -> Tensors:
        """AdamW."""
        config, step = self.config, self.next_step(state["step"])
        parameters, first, second = (self.part(state, part) for part in ("model", "exp_avg", "exp_avg_sq"))
        for name, gradient in gradients.items():
            gradient = self.penalize(name, gradient, parameters[name])
            first[name] = first[name] + (1 - config.beta1) * (gradient - first[name])
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * gradient * gradient
            corrected = self.correct(first[name], config.beta1, step)
            root = self.root(self.correct(second[name], config.beta2, step))
            parameters[name] = self.decay(name, parameters[name]) - config.learning_rate * corrected / root
        return join_state(parameters, first, second, state["step"] + 1)

    def part(self, state: Mapping[str, torch.Tensor], part: str) -> Tensors:
        """The parameters, or their moments."""
        return part_of_state(state, part)

    def next_step(self, step: torch.Tensor) -> int:
        """The updates made, with this one."""
        return int(step) + 1

    def penalize(self, name: str, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Weight decay in the gradient: none."""
        return gradient

    def decay(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """Weight decay beside the gradient."""
        return parameter * (1 - self.config.learning_rate * self.config.weight_decay)

    def correct(self, moment: torch.Tensor, beta: float, step: int) -> torch.Tensor:
        """A moment as if it had not begun at 0."""
        return moment / (1 - beta**step)

    def root(self, second: torch.Tensor) -> torch.Tensor:
        """What the first moment is divided by."""
        return second.sqrt() + self.config.adam_epsilon
