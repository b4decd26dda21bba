"""Right but different trainers."""

import torch

from gaugeblock.conformance.selftest.simulated.train_image_diffusion import CLIPPING_EPSILON, Trainer
from gaugeblock.conformance.selftest.variant import right
from gaugeblock.reference.torch.train_image_diffusion import join_state


class OptimizerOfTorch(Trainer):
    """torch.optim.AdamW."""

    way = ""  # what does it: torch.optim's own choice, "foreach" or "fused"

    def update(self, state, gradients):
        config = self.config
        parameters, first, second = (
            {name: each.clone() for name, each in self.part(state, part).items()} for part in ("model", "exp_avg", "exp_avg_sq")
        )
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_epsilon,
            weight_decay=config.weight_decay, **({self.way: True} if self.way else {}),
        )  # fmt: skip
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]
            step = state["step"].float().clone()
            optimizer.state[parameter] = {"step": step, "exp_avg": first[name], "exp_avg_sq": second[name]}
        optimizer.step()
        return join_state(parameters, first, second, state["step"] + 1)


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

    def update(self, state, gradients):
        config, step = self.config, self.next_step(state["step"])
        parameters, first, second = (self.part(state, part) for part in ("model", "exp_avg", "exp_avg_sq"))
        for name, gradient in gradients.items():
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * gradient
            second[name] = second[name].lerp(gradient.square(), 1 - config.beta2)
            update = self.correct(first[name], config.beta1, step) / self.root(self.correct(second[name], config.beta2, step))
            parameters[name] = parameters[name] - config.learning_rate * (update + config.weight_decay * parameters[name])
        return join_state(parameters, first, second, state["step"] + 1)


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
