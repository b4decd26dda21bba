"""Right but different trainers."""

from typing import Any

import torch

from gaugeblock.conformance.selftest.simulated.train_image_diffusion import Trainer, TrainerOfExperts, TrainerOnTexts
from gaugeblock.conformance.selftest.simulated.training import CLIPPING_EPSILON
from gaugeblock.conformance.selftest.variant import right
from gaugeblock.reference.torch import training


class OptimizerOfTorch(Trainer):
    """torch.optim.AdamW."""

    way = ""  # what does it: torch.optim's own choice, "foreach" or "fused"

    def update(self, state, gradients):
        config = self.config
        parts = {part: {name: each.clone() for name, each in self.part(state, part).items()} for part in config.parts}
        common: dict[str, Any] = {
            "lr": self.rate(int(state["step"]) + 1),
            "weight_decay": config.weight_decay,
            **({self.way: True} if self.way else {}),
        }
        adam: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.adam_epsilon}
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "adamw": (torch.optim.AdamW, adam),
            "adam": (torch.optim.Adam, adam),
            "sgd": (torch.optim.SGD, {"momentum": config.momentum}),
        }
        kind, options = kinds[config.optimizer]
        optimizer = kind(parts["model"].values(), **common, **options)
        for name, parameter in parts["model"].items():
            parameter.grad = gradients[name]
            moments = {moment: parts[moment][name] for moment in config.moments}
            optimizer.state[parameter] = {"step": state["step"].float().clone(), **moments}
        optimizer.step()
        if config.ema is not None:
            keep = self.kept_by_average(int(state["step"]) + 1)
            parts["ema"] = {name: each.lerp(parts["model"][name], 1 - keep) for name, each in parts["ema"].items()}
        return training.join_state(parts, state["step"] + 1)


@right(dtypes=("float32",))
class OptimizerOverAllTensors(OptimizerOfTorch):
    """AdamW by torch._foreach, and torch's own clipping."""

    way = "foreach"

    def clip(self, gradients, norm):
        leaves = [torch.zeros_like(each) for each in gradients.values()]
        for leaf, gradient in zip(leaves, gradients.values(), strict=True):
            leaf.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(leaves, self.config.max_gradient_norm)
        return {name: leaf.grad for name, leaf in zip(gradients, leaves, strict=True)}


@right(dtypes=("float32",))
class OptimizerFused(OptimizerOfTorch):
    """AdamW in one kernel."""

    way = "fused"


@right(dtypes=("float32",))
class ExampleByExample(Trainer):
    """Every example is a microbatch, from the last to the first."""

    def microbatches(self, batch_size):
        return list(torch.arange(batch_size).flip(0).split(1))


@right(dtypes=("float32",))
class BatchAtOnce(Trainer):
    """One batch, whatever the number of microbatches."""

    def microbatches(self, batch_size):
        return [torch.arange(batch_size)]


@right(dtypes=("float32",))
class UpdateWrittenOtherwise(Trainer):
    """Optax's order: corrected moments first; decay beside the update, both times the learning rate."""

    def update_one(self, parts, name, gradient, step):
        config = self.config
        if config.optimizer != "adamw":
            super().update_one(parts, name, gradient, step)
            return
        parameters, first, second = parts["model"], parts["exp_avg"], parts["exp_avg_sq"]
        first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient
        second[name] = second[name].lerp(gradient.square(), 1 - config.beta2)
        update = self.correct(first[name], config.beta1, step) / self.root(self.correct(second[name], config.beta2, step))
        parameters[name] = parameters[name] - self.rate(step) * (update + config.weight_decay * parameters[name])


@right(dtypes=("float32",))
class OptimizerInFloat64(Trainer):
    """Norm, clipping and update in float64, each result rounded once."""

    def clip(self, gradients, norm):
        exact = torch.cat([each.double().flatten() for each in gradients.values()]).norm()
        factor = (self.config.max_gradient_norm / (exact + CLIPPING_EPSILON)).clamp(max=1)
        return {name: factor * each.double() for name, each in gradients.items()}

    def part(self, state, part):
        return {name: each.double() for name, each in super().part(state, part).items()}

    def update(self, state, gradients):
        return {name: each if name == "step" else each.float() for name, each in super().update(state, gradients).items()}


@right(dtypes=("float32",))
class TextsExampleByExample(TrainerOnTexts):
    """Every example is a microbatch; a dropped text is picked, not multiplied."""

    def microbatches(self, batch_size):
        return list(torch.arange(batch_size).split(1))

    def dropped(self, texts, kept):
        return torch.where(kept > 0, texts, 0.0)


@right(dtypes=("float32",))
class TextsOptimizerInFloat64(OptimizerInFloat64, TrainerOnTexts):
    """Norm, clipping and update in float64, each result rounded once; of a model that is told texts."""


@right(dtypes=("float32",))
class ExpertsOptimizerInFloat64(OptimizerInFloat64, TrainerOfExperts):
    """Norm, clipping and update in float64, each result rounded once; of a mixture of experts."""


class WithGradientOf(torch.autograd.Function):
    """What a model predicts, through which a loss gets its gradient, 1, on the way back."""

    @staticmethod
    def forward(ctx, predicted, loss):
        return predicted.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_ones(())


@right(dtypes=("float32",))
class BalanceOnTheWayBack(TrainerOfExperts):
    """The balance is not in what is differentiated: its gradient is added where the prediction's passes, as in feizc/DiT-MoE."""

    def predict(self, parameters, noised, timesteps, labels):
        return WithGradientOf.apply(super().predict(parameters, noised, timesteps, labels), self.balance)

    def objective(self, loss, balance):
        return loss
