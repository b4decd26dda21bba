"""DiT-MoE in JAX: the reference, compiled for each configuration and each batch size."""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEModelConfig
from gaugeblock.reference.jax import dit_moe as reference


def dit_moe(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    timesteps: jax.Array,
    class_labels: jax.Array,
    *,
    config: DiTMoEModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Return `gaugeblock.reference.jax.dit_moe.dit_moe`, compiled; labels cannot be read while traced."""
    validation.dit(state, latents, timesteps, class_labels, config, reference.state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    return _dit_moe(dict(state), latents, timesteps, class_labels, config=config)


_dit_moe = jax.jit(reference.dit_moe, static_argnames="config")
