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
    """Draw the noise that the sampling of each example starts from.

    Args:
        example_ids: [batch_size], integer in 0..2**32 - 1; an id gets the same noise in any batch.
        shape: Of one example.
        seed: In 0..2**64 - 1.

    Returns:
        [batch_size, *shape], float32, standard normal.

    Raises: as `random.bits`.
    """
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
    """Follow the guided velocity from noise at time 1 to data at time 0, by Euler's method in equal steps.

        t = 1 - n / num_steps,  n = 0 .. num_steps - 1
        v = model(x, 1000 t, null_label);  v = v + guidance_scale * (model(x, 1000 t, label) - v)
        x = x - v / num_steps  where velocity is "noise - data"
        x = x + v / num_steps  where velocity is "data - noise"

    Args:
        model: Function of (x, timesteps [batch_size] in (0, 1000], labels) that predicts the velocity, like x; for instance
            `functools.partial(dit.dit, parameters, config=config)`.
        noise: [batch_size, ...], float32 or float64.
        labels: [batch_size], integer.
        null_label: The label that stands for none, with which the model was trained for some of the examples.
        guidance_scale: 0 ignores the labels, 1 is the model itself, more is further from no label.
        num_steps: At least 1.
        velocity: Which way the predicted velocity points.

    Returns:
        Like noise.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `num_steps` is not an integer.
        ValueError: Shapes do not fit together, `num_steps` is not positive, or `velocity` is neither of the two.

    Source: Liu et al. (arXiv:2209.03003), section 2.1; guidance: Ho and Salimans (arXiv:2207.12598), equation 6, with
    guidance_scale = w + 1.
    """
    validation.euler_sample(noise, labels, num_steps, velocity)

    x, null_labels = noise, jnp.full_like(labels, null_label)
    time_per_step = (-1 if velocity == "noise - data" else 1) / num_steps
    for n in range(num_steps):
        timesteps_B = jnp.full(labels.shape, TIMESTEPS * (1 - n / num_steps), x.dtype)
        unguided = model(x, timesteps_B, null_labels)
        guided = unguided + guidance_scale * (model(x, timesteps_B, labels) - unguided)
        x = x + time_per_step * guided
    return x
