"""How a dense MLP of GPT-2 becomes an MoE layer, and how an optimizer leaves experts alone that had no tokens.

Shapes: E num_experts, H hidden_size, I intermediate_size.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.jax import random
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.moe_states import OF_AN_EXPERT
from gaugeblock.reference.upcycled_checkpoints import GATE


def upcycle(dense: Mapping[str, jax.Array], draws: Mapping[str, jax.Array], *, perturbation_std: float) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.upcycling.upcycle`."""
    validation.upcycle(dense, draws, perturbation_std)
    num_experts = draws[GATE].shape[0]
    state = {GATE: draws[GATE].astype(dense["c_fc.weight"].dtype)}
    for name in OF_AN_EXPERT:
        copies = jnp.broadcast_to(jax.lax.stop_gradient(dense[name]), (num_experts, *dense[name].shape))
        if perturbation_std:
            values = at_least_float32(copies)
            noise = perturbation_std * deviation(dense[name]) * draws[f"experts.{name}"].astype(values.dtype)
            copies = (values + noise).astype(copies.dtype)
        state[f"experts.{name}"] = copies
    return state


def deviation(parameter: jax.Array) -> jax.Array:
    """Return the unbiased standard deviation over all elements, [], in at least float32; of one element 0."""
    values = at_least_float32(jax.lax.stop_gradient(parameter))
    return jnp.sqrt(jnp.square(values - values.mean()).sum() / max(1, values.size - 1))


def upcycling_draws(
    *, num_experts: int, hidden_size: int, intermediate_size: int, seed: int, layer: int = 0
) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.upcycling.upcycling_draws`."""
    key = {"seed": seed, "step": layer, "purpose": purposes.UPCYCLING}
    uniform_EH = random.uniform((num_experts, hidden_size), **key, example=0)
    draws = {GATE: (2 * uniform_EH - 1) * hidden_size**-0.5}
    shapes = ((hidden_size, intermediate_size), (intermediate_size,), (intermediate_size, hidden_size), (hidden_size,))
    for place, (name, shape) in enumerate(zip(OF_AN_EXPERT, shapes, strict=True)):
        example_E = 1 + len(shapes) * jnp.arange(num_experts) + place
        draws[f"experts.{name}"] = random.normal(shape, **key, example=example_E)
    return draws


def adamw_of_used_experts(
    parameter: jax.Array,
    gradient: jax.Array,
    exp_avg: jax.Array,
    exp_avg_sq: jax.Array,
    steps: jax.Array,
    tokens_per_expert: jax.Array,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    adam_epsilon: float,
    weight_decay: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.upcycling.adamw_of_used_experts`, but steps are int32 unless they were given as int64."""
    options = {"learning_rate": learning_rate, "adam_epsilon": adam_epsilon, "weight_decay": weight_decay}
    arrays = parameter, gradient, exp_avg, exp_avg_sq
    validation.adamw_of_used_experts(*arrays, steps, tokens_per_expert, beta1=beta1, beta2=beta2, **options)

    parameter, gradient, exp_avg, exp_avg_sq = (jax.lax.stop_gradient(each) for each in arrays)
    used_E = tokens_per_expert > 0
    steps_E = steps.astype(jnp.promote_types(steps.dtype, jnp.int32)) + used_E
    per_expert = (-1, *(1 for _ in parameter.shape[1:]))
    used, new_steps = used_E.reshape(per_expert), steps_E.reshape(per_expert).astype(parameter.dtype)

    new_avg = beta1 * exp_avg + (1 - beta1) * gradient
    new_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * jnp.square(gradient)
    deviations = jnp.sqrt(new_avg_sq / share_averaged(new_steps, beta2)) + adam_epsilon
    update = new_avg / share_averaged(new_steps, beta1) / deviations
    new_parameter = parameter - learning_rate * (update + weight_decay * parameter)
    pairs = ((new_parameter, parameter), (new_avg, exp_avg), (new_avg_sq, exp_avg_sq))
    parameter, exp_avg, exp_avg_sq = (jnp.where(used, new, old) for new, old in pairs)
    return parameter, exp_avg, exp_avg_sq, steps_E


def share_averaged(steps: jax.Array, beta: float) -> jax.Array:
    """Return 1 - beta**steps; the difference in float32 would keep five digits of it at the first steps."""
    return -jnp.expm1(steps * math.log(beta)) if beta else jnp.ones_like(steps)
