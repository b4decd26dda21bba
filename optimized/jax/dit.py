"""DiT in JAX: the reference, compiled for each configuration and each batch size."""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.jax import dit as reference


def dit(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    timesteps: jax.Array,
    class_labels: jax.Array,
    *,
    config: DiTConfig,
) -> jax.Array:
    """Return `gaugeblock.reference.jax.dit.dit`, compiled; labels, which cannot be read while traced, are checked before."""
    validation.dit(state, latents, timesteps, class_labels, config, reference.state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    return _dit(dict(state), latents, timesteps, class_labels, config=config)


_dit = jax.jit(reference.dit, static_argnames="config")
