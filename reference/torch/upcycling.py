"""How a dense MLP of GPT-2 becomes an MoE layer, and how an optimizer leaves experts alone that had no tokens.

Shapes: E num_experts, H hidden_size, I intermediate_size.
"""

import math
from collections.abc import Mapping

import torch

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.moe_states import OF_AN_EXPERT
from gaugeblock.reference.torch import random
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.upcycled_checkpoints import GATE


def upcycle(
    dense: Mapping[str, torch.Tensor], draws: Mapping[str, torch.Tensor], *, perturbation_std: float
) -> dict[str, torch.Tensor]:
    """Make the state of a layer whose experts are copies of a dense MLP, each with noise of its own, or with none.

        router.gate.weight = draws["router.gate.weight"]
        experts.p[e] = dense[p] + perturbation_std * deviation(dense[p]) * draws["experts.p"][e],  p = c_fc.weight, …

    The deviation is unbiased, over all elements of a parameter; of one element it is 0 (NaN in the public code). Where
    `perturbation_std` is 0 the copies are exact. The layer is then the dense MLP, whatever the gate: with one expert per token,
    whose weight is just 1, as far as products have the same bits for rows by themselves and among others, and with several as far
    as their weights sum to 1 (less 1e-9 in a denominator). Libraries choose a kernel by the number of rows: with MKL two
    computations differ in the last bits of float32, and in bfloat16 where that decides a rounding.

    Args:
        dense: `c_fc.weight` [hidden_size, intermediate_size], `c_fc.bias` [intermediate_size], `c_proj.weight`
            [intermediate_size, hidden_size], `c_proj.bias` [hidden_size], floating.
        draws: What `upcycling_draws` returns, or like it: named and shaped as the state of the layer.
        perturbation_std: In deviations of each parameter, 1e-3 in the public code; 0 or more.

    Returns:
        The state of `biased_moe_layers.upcycled_gpt2_moe`, each entry in the dtype of the dense one and the gate in that of
        `c_fc.weight`; computed in float32 (float64 for float64 parameters) and rounded once.

    Raises:
        TypeError: An array is not floating, an argument not a dict of arrays, or `perturbation_std` no number.
        ValueError: Shapes or devices do not fit together, an entry is missing or superfluous, or `perturbation_std` is negative
            or not finite.

    Source: sumitdotml/moe-emergence, `moe_emergence/gpt2_moe.py`; Komatsuzaki et al. 2022 (arXiv:2212.05055), section 3.
    """
    validation.upcycle(dense, draws, perturbation_std)
    num_experts = draws[GATE].shape[0]
    state = {GATE: draws[GATE].to(dense["c_fc.weight"].dtype)}
    for name in OF_AN_EXPERT:
        copies = dense[name].detach().expand(num_experts, *dense[name].shape).clone()
        if perturbation_std:
            values = at_least_float32(copies)
            noise = perturbation_std * deviation(dense[name]) * draws[f"experts.{name}"].to(values.dtype)
            copies = (values + noise).to(copies.dtype)
        state[f"experts.{name}"] = copies
    return state


def deviation(parameter: torch.Tensor) -> torch.Tensor:
    """Return the unbiased standard deviation over all elements, [], in at least float32; of one element 0."""
    values = at_least_float32(parameter.detach())
    return torch.sqrt((values - values.mean()).square().sum() / max(1, values.numel() - 1))


def upcycling_draws(
    *, num_experts: int, hidden_size: int, intermediate_size: int, seed: int, layer: int = 0
) -> dict[str, torch.Tensor]:
    """Draw what `upcycle` takes: a gate as torch's linear layers begin, and standard normals for each expert's parameters.

    They are draws of the purpose `UPCYCLING` for examples in the public order: 0 is the gate, uniform in -1/sqrt(hidden_size)
    to 1/sqrt(hidden_size); 1 + 4 e + p is the parameter p of expert e, of `c_fc.weight`, `c_fc.bias`, `c_proj.weight`,
    `c_proj.bias`. The numbers are not those of torch's generator.

    Args:
        num_experts: Of the layer.
        hidden_size: Of the model.
        intermediate_size: Of the MLP.
        seed: In 0 .. 2**64 - 1.
        layer: Which layer of the model it is, in place of a step: each has draws of its own.

    Returns:
        Named and shaped as the state of the layer, float32.

    Raises:
        TypeError: `seed` or `layer` is not an integer.
        ValueError: It is out of its range.

    Source: sumitdotml/moe-emergence, `moe_emergence/gpt2_moe.py`, for the order and the distributions.
    """
    key = {"seed": seed, "step": layer, "purpose": purposes.UPCYCLING}
    uniform_EH = random.uniform((num_experts, hidden_size), **key, example=0)
    draws = {GATE: (2 * uniform_EH - 1) * hidden_size**-0.5}
    shapes = ((hidden_size, intermediate_size), (intermediate_size,), (intermediate_size, hidden_size), (hidden_size,))
    for place, (name, shape) in enumerate(zip(OF_AN_EXPERT, shapes, strict=True)):
        example_E = 1 + len(shapes) * torch.arange(num_experts) + place
        draws[f"experts.{name}"] = random.normal(shape, **key, example=example_E)
    return draws


def adamw_of_used_experts(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    steps: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    adam_epsilon: float,
    weight_decay: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make a step of AdamW for the experts that had tokens; all else stays as it is, without decay, whatever the gradient.

        steps      = steps + 1                                        of experts with tokens_per_expert > 0
        exp_avg    = beta1 * exp_avg + (1 - beta1) * gradient         of these
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient**2   of these
        update     = exp_avg / (1 - beta1**steps) / (sqrt(exp_avg_sq / (1 - beta2**steps)) + adam_epsilon)
        parameter  = parameter - learning_rate * (update + weight_decay * parameter)   of these

    So torch.optim.AdamW treats experts that are parameters of their own, whose gradient is None where no token came. Stacked
    parameters have a gradient of zeros there, by which any optimizer would move and decay them.

    Args:
        parameter: [num_experts, ...], float32 or float64: one of a layer's stacked parameters.
        gradient: Like parameter.
        exp_avg: Like parameter: the average of gradients.
        exp_avg_sq: Like parameter: the average of squared gradients.
        steps: [num_experts], integer: the updates that each expert has had.
        tokens_per_expert: [num_experts], integer: assignments in all micro-batches of this step (`expert_load`).
        learning_rate: 0 or more.
        beta1: 0 to below 1; 0.9 in the public runs.
        beta2: 0 to below 1; 0.999 there.
        adam_epsilon: 0 or more; 1e-8 there.
        weight_decay: 0 or more; 0.01 there.

    Returns:
        parameter, exp_avg, exp_avg_sq: Like those given; no gradient.
        steps: [num_experts], int64.

    Raises:
        TypeError: An array is not of the dtype above, or an option no number.
        ValueError: Shapes or devices do not fit together, or an option is out of its range.

    Source: Loshchilov and Hutter (arXiv:1711.05101), algorithm 2, as in torch.optim.AdamW; sumitdotml/moe-emergence,
    `moe_emergence/train.py`.
    """
    options = {"learning_rate": learning_rate, "adam_epsilon": adam_epsilon, "weight_decay": weight_decay}
    arrays = parameter, gradient, exp_avg, exp_avg_sq
    validation.adamw_of_used_experts(*arrays, steps, tokens_per_expert, beta1=beta1, beta2=beta2, **options)

    parameter, gradient, exp_avg, exp_avg_sq = (each.detach() for each in arrays)
    used_E = tokens_per_expert > 0
    steps_E = steps.to(torch.int64) + used_E
    per_expert = (-1, *(1 for _ in parameter.shape[1:]))
    used, new_steps = used_E.reshape(per_expert), steps_E.reshape(per_expert).to(parameter.dtype)

    new_avg = beta1 * exp_avg + (1 - beta1) * gradient
    new_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient.square()
    deviations = torch.sqrt(new_avg_sq / share_averaged(new_steps, beta2)) + adam_epsilon
    update = new_avg / share_averaged(new_steps, beta1) / deviations
    new_parameter = parameter - learning_rate * (update + weight_decay * parameter)
    pairs = ((new_parameter, parameter), (new_avg, exp_avg), (new_avg_sq, exp_avg_sq))
    parameter, exp_avg, exp_avg_sq = (torch.where(used, new, old) for new, old in pairs)
    return parameter, exp_avg, exp_avg_sq, steps_E


def share_averaged(steps: torch.Tensor, beta: float) -> torch.Tensor:
    """Return 1 - beta**steps; the difference in float32 would keep five digits of it at the first steps."""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)
