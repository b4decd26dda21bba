"""The UNets in JAX: the references, compiled for each configuration and each size of latents and text."""

from collections.abc import Mapping

import jax

from gaugeblock.reference.configs import UNetConfig
from gaugeblock.reference.jax import unet as reference


def unet(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    encoder_attention_mask: jax.Array | None = None,
    *,
    config: UNetConfig,
) -> jax.Array:
    """Return `gaugeblock.reference.jax.unet.unet`, compiled."""
    return _unet(state, latents, timesteps, encoder_hidden_states, encoder_attention_mask, config=config)


def unet_text_time(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    timesteps: jax.Array,
    encoder_hidden_states: jax.Array,
    text_embeds: jax.Array,
    time_ids: jax.Array,
    encoder_attention_mask: jax.Array | None = None,
    *,
    config: UNetConfig,
) -> jax.Array:
    """Return `gaugeblock.reference.jax.unet.unet_text_time`, compiled."""
    return _unet_text_time(
        state, latents, timesteps, encoder_hidden_states, text_embeds, time_ids, encoder_attention_mask, config=config
    )


_unet = jax.jit(reference.unet, static_argnames="config")
_unet_text_time = jax.jit(reference.unet_text_time, static_argnames="config")
