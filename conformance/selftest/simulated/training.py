"""What simulated training steps share: microbatches, clipping, the optimizer, the average, each written out and overridable."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from gaugeblock.reference.configs import TrainingConfig
from gaugeblock.reference.torch import training

CLIPPING_EPSILON = 1e-6

Tensors = dict[str, torch.Tensor]


class Run:
    """A step of which `losses` says what is learned."""

    config: TrainingConfig

    # ------------------------------------------------------------------------------------------------------ gradients

    def add_up(self, parameters: Tensors, trained: list[str], batch: tuple[Any, ...], step: int) -> tuple[torch.Tensor, Tensors]:
        """The loss of a batch and its gradients, of one microbatch after the other."""
        leaves = {name: parameters[name].detach().requires_grad_() for name in trained}
        loss = torch.zeros(())
        total = {name: torch.zeros_like(each) for name, each in leaves.items()}
        for chosen in self.microbatches(len(batch[0])):
            losses = self.losses(parameters | leaves, *(each[chosen] for each in batch), step)
            share = self.share(losses, len(batch[0]))
            found = torch.autograd.grad(share, list(leaves.values()), materialize_grads=True)
            loss = loss + share.detach()
            total = {name: self.accumulate(total[name], each) for name, each in zip(leaves, found, strict=True)}
        return loss, total

    def losses(self, parameters: Tensors, *batch: Any) -> torch.Tensor:
        """Of each example, `[B]`; the last argument is the step."""
        raise NotImplementedError

    def microbatches(self, batch_size: int) -> list[torch.Tensor]:
        """Which examples each holds."""
        return list(torch.arange(batch_size).tensor_split(max(1, min(self.config.accumulation_steps, batch_size))))

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

    def update(self, state: Mapping[str, torch.Tensor], gradients: Tensors) -> Tensors:
        """The optimizer, then the average."""
        parts = {part: self.part(state, part) for part in self.config.parts}
        before, step = dict(parts["model"]), self.next_step(state["step"])
        for name, gradient in gradients.items():
            self.update_one({part: tensors for part, tensors in parts.items() if part != "ema"}, name, gradient, step)
        if self.config.ema is not None:
            keep = self.kept_by_average(int(state["step"]) + 1)
            averaged = self.averaged(before, parts["model"])
            # not keep * each + (1 - keep) * averaged: rounded to float32, the two do not add up to 1, an error of one sign
            parts["ema"] = {name: each + (1 - keep) * (averaged[name] - each) for name, each in parts["ema"].items()}
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
        count, first = self.config.num_warmup_steps, self.config.first_warmup_step
        return min(1.0, (updates + first) / count) if count else 1.0

    def fall(self, updates: int) -> float:
        """What part of it is left after so many updates."""
        config = self.config
        if config.learning_rate_schedule == "constant":
            return 1.0
        assert config.num_training_steps is not None
        done = (updates - config.num_warmup_steps) / (config.num_training_steps - config.num_warmup_steps)
        done = min(max(done, 0.0), 1.0)
        left = 1 - done if config.learning_rate_schedule == "linear" else math.cos(math.pi / 2 * done) ** 2
        return left + config.final_learning_rate_ratio * (1 - left)

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
