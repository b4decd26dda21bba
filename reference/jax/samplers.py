"""Samplers: from noise to data along the velocity that a model predicts.

Shapes: B batch_size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import VelocitySign
from gaugeblock.reference.jax import random
from gaugeblock.reference.jax.objectives import TIMESTEPS


def starting_noise(example_ids: jax.Array, *, shape: tuple[int, ...], seed: int) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.starting_noise`."""
    return random.normal(shape, seed=seed, step=0, example=example_ids, purpose=purposes.SAMPLING_NOISE)


def euler_sample(
    model: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    labels: jax.Array,
    *,
    null_label: int,
    guidance_scale: float,
    num_steps: int,
    velocity: VelocitySign,
) -> jax.Array:
    """As `gaugeblock.reference.torch.samplers.euler_sample`."""
    validation.euler_sample(noise, labels, num_steps, velocity)

    x, null_labels = noise, jnp.full_like(labels, null_label)
    time_per_step = (-1 if velocity == "noise - data" else 1) / num_steps
    for n in range(num_steps):
        timesteps_B = jnp.full(labels.shape, TIMESTEPS * (1 - n / num_steps), x.dtype)
        unguided = model(x, timesteps_B, null_labels)
        guided = unguided + guidance_scale * (model(x, timesteps_B, labels) - unguided)
        x = x + time_per_step * guided
    return x
