"""MMDiT in JAX: the reference, compiled for each configuration and each size of its inputs."""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.jax import mmdit as reference


def mmdit(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array,
    timesteps: jax.Array,
    *,
    config: MMDiTConfig,
) -> jax.Array:
    """Return `gaugeblock.reference.jax.mmdit.mmdit`, compiled."""
    arrays = latents, encoder_hidden_states, pooled_projections, timesteps
    validation.mmdit(state, *arrays, config, reference.state_shapes(config))
    return _mmdit(dict(state), *arrays, config=config)


_mmdit = jax.jit(reference.mmdit, static_argnames="config")
