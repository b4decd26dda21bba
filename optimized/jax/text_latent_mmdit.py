"""The text-latent MMDiT in JAX: the reference, compiled for each configuration and each number of texts and tokens."""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import TextLatentMMDiTConfig
from gaugeblock.reference.jax import text_latent_mmdit as reference


def text_latent_mmdit(
    state: Mapping[str, jax.Array],
    text_tokens: jax.Array,
    latents: jax.Array,
    text_timesteps: jax.Array,
    latent_timesteps: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    config: TextLatentMMDiTConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `gaugeblock.reference.jax.text_latent_mmdit.text_latent_mmdit`, compiled.

    Ids, unreadable while traced, are checked before.
    """
    inputs = text_tokens, latents, text_timesteps, latent_timesteps, attention_mask
    validation.text_latent_mmdit(state, *inputs, config, reference.state_shapes(config))
    validation.text_latent_tokens_in_range(text_tokens, config)
    return _text_latent_mmdit(dict(state), *inputs, config=config)


_text_latent_mmdit = jax.jit(reference.text_latent_mmdit, static_argnames="config")
