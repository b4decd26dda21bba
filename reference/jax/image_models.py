"""Image models as a training step sees them: of noised images, times, and classes or texts, what a model predicts.

What a model wants beside them follows from these: patches and their places (Flux), guidance as it was distilled (Flux-dev).

Shapes: B batch_size, C channels, H and W height and width, T text_length.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import unet_states
from gaugeblock.reference.configs import (
    ClassModelConfig,
    DiTConfig,
    DiTMoEModelConfig,
    FluxConfig,
    ImageModelConfig,
    MMDiTConfig,
    UNetConfig,
)
from gaugeblock.reference.jax import dit, dit_moe, flux, mmdit, random, unet
from gaugeblock.reference.jax.objectives import TIMESTEPS

ZERO_AT_FIRST = re.compile(r"adaLN_modulation\.|norm\w*\.linear\.|^(final_layer|norm_out|proj_out|conv_out)\.")
GUIDANCE = 3.5  # what a model that takes a guidance scale is told in training: black-forest-labs FLUX.1-dev's default


def state_shapes(config: ImageModelConfig) -> Mapping[str, tuple[int, ...]]:
    """As `gaugeblock.reference.torch.image_models.state_shapes`."""
    match config:
        case DiTMoEModelConfig():
            return dit_moe.state_shapes(config)
        case DiTConfig():
            return dit.state_shapes(config)
        case UNetConfig():
            return unet_states.state_shapes(config)
        case FluxConfig():
            return flux.state_shapes(config)
        case MMDiTConfig():
            return mmdit.state_shapes(config)


def frozen_names(config: ImageModelConfig) -> tuple[str, ...]:
    """As `gaugeblock.reference.torch.image_models.frozen_names`."""
    return (mmdit.POSITIONS,) if isinstance(config, MMDiTConfig) else ()


def initial_state(config: ImageModelConfig, *, seed: int) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.image_models.initial_state`."""
    if type(config) is DiTConfig:
        return dit.initial_state(config, seed=seed)
    state = {}
    for place, (name, shape) in enumerate(state_shapes(config).items()):
        if isinstance(config, MMDiTConfig) and name == mmdit.POSITIONS:
            state[name] = mmdit.positions(config)
        else:
            state[name] = initial_parameter(name, shape, seed=seed, place=place)
    return state


def initial_parameter(name: str, shape: tuple[int, ...], *, seed: int, place: int) -> jax.Array:
    """As `gaugeblock.reference.torch.image_models.initial_parameter`."""
    key: dict[str, Any] = {"seed": seed, "step": 0, "example": place, "purpose": dit.INITIAL_WEIGHTS}
    if name.endswith(".bias") or ZERO_AT_FIRST.search(name):
        return jnp.zeros(shape)
    if len(shape) == 1:
        return jnp.ones(shape)
    if "embedding_table" in name or name.endswith("_embedding.weight"):
        return 0.02 * random.normal(shape, **key)
    fan_in = math.prod(shape[-1:] if len(shape) == 3 else shape[1:])  # of three axes, the first is of experts
    return fan_in**-0.5 * (2 * random.uniform(shape, **key) - 1)


def operation(config: ImageModelConfig) -> Callable[..., Any]:
    """As `gaugeblock.reference.torch.image_models.operation`."""
    match config:
        case DiTMoEModelConfig():
            return dit_moe.dit_moe
        case DiTConfig():
            return dit.dit
        case UNetConfig():
            return unet.unet
        case FluxConfig():
            return flux.flux
        case MMDiTConfig():
            return mmdit.mmdit


def predict(
    model: Callable[..., Any],
    noised: jax.Array,
    timesteps: jax.Array,
    labels: jax.Array | None,
    encoder_hidden_states: jax.Array | None,
    pooled_projections: jax.Array | None,
    *,
    config: ImageModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.image_models.predict`."""
    match config:
        case DiTMoEModelConfig():
            return model(noised, timesteps, labels)
        case DiTConfig():
            prediction = model(noised, timesteps, labels)
        case UNetConfig():
            prediction = model(noised, timesteps, encoder_hidden_states)
        case FluxConfig():
            prediction = _flux(model, noised, timesteps, encoder_hidden_states, pooled_projections)
        case MMDiTConfig():
            prediction = model(noised, encoder_hidden_states, pooled_projections, timesteps)
    return prediction, jnp.zeros((), timesteps.dtype)


def drop(
    labels: jax.Array | None,
    encoder_hidden_states: jax.Array | None,
    pooled_projections: jax.Array | None,
    is_dropped: jax.Array,
    *,
    config: ImageModelConfig,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """As `gaugeblock.reference.torch.image_models.drop`."""
    if labels is not None and isinstance(config, ClassModelConfig):
        labels = jnp.where(is_dropped, config.num_classes, labels.astype(int))
    if encoder_hidden_states is not None:
        encoder_hidden_states = encoder_hidden_states * ~is_dropped[:, None, None]
    if pooled_projections is not None:
        pooled_projections = pooled_projections * ~is_dropped[:, None]
    return labels, encoder_hidden_states, pooled_projections


def _flux(model: Callable[..., jax.Array], noised: jax.Array, timesteps: jax.Array, texts: Any, pooled: Any) -> jax.Array:
    """Give Flux its tokens and their places, and times in [0, 1]."""
    _, _, height, width = noised.shape
    guidance_B = jnp.full_like(timesteps, GUIDANCE)
    places = flux.image_ids(noised), flux.text_ids(texts)
    tokens_BND = model(flux.pack_latents(noised), texts, pooled, timesteps / TIMESTEPS, guidance_B, *places)
    return flux.unpack_latents(tokens_BND, height=height, width=width)
