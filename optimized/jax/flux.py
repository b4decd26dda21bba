"""Flux in JAX: the reference, compiled for each configuration and each shape."""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.jax import flux as reference


def flux(
    state: Mapping[str, jax.Array],
    hidden_states: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array,
    timesteps: jax.Array,
    guidance: jax.Array,
    img_ids: jax.Array,
    txt_ids: jax.Array,
    *,
    config: FluxConfig,
) -> jax.Array:
    """Return `gaugeblock.reference.jax.flux.flux`, compiled."""
    arrays = hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids
    validation.flux(state, *arrays, config, reference.state_shapes(config))
    return _flux(dict(state), *arrays, config=config)


_flux = jax.jit(reference.flux, static_argnames="config")
