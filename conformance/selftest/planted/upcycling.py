"""Bugs of optimizers whose experts are stacked, so that those without tokens have a gradient of zeros."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.reference.torch import upcycling

ADAMW = "upcycling.adamw_of_used_experts"


@fault(ADAMW, caught_by="parity", kind="state", source="optax.adamw and torch.optim.AdamW on stacked parameters")
class GradientsOfZeros:
    """Experts without tokens decay, and go on in the direction of their moments."""

    def __call__(self, parameter, gradient, exp_avg, exp_avg_sq, steps, tokens_per_expert, **options):
        kept = torch.where(tokens_per_expert[:, None] > 0, gradient, 0.0)
        every = torch.ones_like(tokens_per_expert)
        return upcycling.adamw_of_used_experts(parameter, kept, exp_avg, exp_avg_sq, steps, every, **options)


@fault(ADAMW, caught_by="parity", kind="state", source="a step count for the whole optimizer")
class StepsOfAll:
    """All experts count a step, whether they had tokens or not."""

    def __call__(self, parameter, gradient, exp_avg, exp_avg_sq, steps, tokens_per_expert, **options):
        *arrays, new_steps = upcycling.adamw_of_used_experts(
            parameter, gradient, exp_avg, exp_avg_sq, steps, tokens_per_expert, **options
        )
        return *arrays, new_steps + (tokens_per_expert <= 0)


@fault(ADAMW, caught_by="parity", kind="structural", source="Adam with L2 regularization, arXiv:1711.05101")
class DecayInTheGradient:
    """The decay passes through the moments."""

    def __call__(self, parameter, gradient, *arrays, weight_decay, **options):
        if parameter.shape == gradient.shape:
            gradient = gradient + weight_decay * parameter
        decayed = upcycling.adamw_of_used_experts(parameter, gradient, *arrays, weight_decay=weight_decay, **options)
        plain = upcycling.adamw_of_used_experts(parameter, gradient, *arrays, weight_decay=0.0, **options)
        return plain[0], *decayed[1:]


@fault(ADAMW, caught_by="parity", kind="precision", source="optax.scale_by_adam, where steps are an int32 array")
class CorrectionsOfFewDigits:
    """1 - beta ** steps is taken in float32."""

    def __call__(self, parameter, gradient, exp_avg, exp_avg_sq, steps, tokens_per_expert, **options):
        result = upcycling.adamw_of_used_experts(
            parameter, gradient, exp_avg, exp_avg_sq, steps, tokens_per_expert, **{**options, "learning_rate": 0.0}
        )
        rate, decay = options["learning_rate"], options["weight_decay"]
        shares = [1 - torch.tensor(options[name]) ** result[3][:, None].float() for name in ("beta1", "beta2")]
        update = result[1] / shares[0] / ((result[2] / shares[1]).sqrt() + options["adam_epsilon"])
        used = tokens_per_expert[:, None] > 0
        return torch.where(used, parameter - rate * (update + decay * parameter), parameter), *result[1:]
