"""At which timesteps a diffusion model is trained; what is random is an argument.

Shapes: B batch_size.
"""

import math

import jax
import jax.numpy as jnp

from gaugeblock.reference import noise_tables, validation
from gaugeblock.reference.configs import TimestepBias


def logit_normal_times(normals: jax.Array, *, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """As `gaugeblock.reference.torch.timestep_sampling.logit_normal_times`."""
    validation.logit_normal_times(normals, mean, std)
    return jax.nn.sigmoid(mean + std * normals)


def mode_times(uniforms: jax.Array, *, scale: float = 1.29) -> jax.Array:
    """As `gaugeblock.reference.torch.timestep_sampling.mode_times`."""
    validation.mode_times(uniforms, scale)
    return 1 - uniforms - scale * (jnp.cos(math.pi / 2 * uniforms) ** 2 - 1 + uniforms)


def timestep_indices(times: jax.Array, *, num_timesteps: int) -> jax.Array:
    """As `gaugeblock.reference.torch.timestep_sampling.timestep_indices`, but int32 where JAX has no int64."""
    validation.timestep_indices(times, num_timesteps)
    return jnp.minimum((times * num_timesteps).astype(int), num_timesteps - 1)


def biased_timesteps(
    uniforms: jax.Array,
    *,
    num_timesteps: int,
    bias: TimestepBias,
    multiplier: float = 1.0,
    portion: float = 0.25,
    begin: int = 0,
    end: int = 1000,
) -> jax.Array:
    """As `gaugeblock.reference.torch.timestep_sampling.biased_timesteps`, but int32 where JAX has no int64."""
    validation.biased_timesteps(uniforms, num_timesteps, bias, multiplier, portion, begin, end)
    sums = noise_tables.timestep_sums(bias, num_timesteps, multiplier, portion, begin, end)
    with jax.enable_x64(True):
        # in float64: in float32 a sum of many thirds is off
        places = jnp.searchsorted(jnp.asarray(sums), uniforms.astype(jnp.float64) * sums[-1], side="right")
    return jnp.minimum(places, num_timesteps - 1).astype(int)
