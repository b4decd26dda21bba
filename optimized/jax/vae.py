"""AutoencoderKL in JAX: the reference, compiled for each configuration and each size of images."""

from collections.abc import Mapping

import jax

from gaugeblock.reference.configs import VAEConfig
from gaugeblock.reference.jax import vae as reference


def encode(state: Mapping[str, jax.Array], images: jax.Array, *, config: VAEConfig) -> tuple[jax.Array, jax.Array]:
    """Return `gaugeblock.reference.jax.vae.encode`, compiled."""
    return _encode(state, images, config=config)


def decode(state: Mapping[str, jax.Array], latents: jax.Array, *, config: VAEConfig) -> jax.Array:
    """Return `gaugeblock.reference.jax.vae.decode`, compiled."""
    return _decode(state, latents, config=config)


_encode = jax.jit(reference.encode, static_argnames="config")
_decode = jax.jit(reference.decode, static_argnames="config")
