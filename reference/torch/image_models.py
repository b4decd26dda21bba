"""Image models as a training step sees them: of noised images, times, and classes or texts, what a model predicts.

What a model wants beside them follows from these: patches and their places (Flux), guidance as it was distilled (Flux-dev).

Shapes: B batch_size, C channels, H and W height and width, T text_length.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

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
from gaugeblock.reference.torch import dit, dit_moe, flux, mmdit, random, unet
from gaugeblock.reference.torch.objectives import TIMESTEPS

ZERO_AT_FIRST = re.compile(r"adaLN_modulation\.|norm\w*\.linear\.|^(final_layer|norm_out|proj_out|conv_out)\.")
GUIDANCE = 3.5  # what a model that takes a guidance scale is told in training: black-forest-labs FLUX.1-dev's default


def state_shapes(config: ImageModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by name."""
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
    """Return the names of what is no parameter, though checkpoints have it: MMDiT's table of positions."""
    return (mmdit.POSITIONS,) if isinstance(config, MMDiTConfig) else ()


def initial_state(config: ImageModelConfig, *, seed: int) -> dict[str, torch.Tensor]:
    """Draw the parameters with which training starts, float32: DiT as its paper has it (`dit.initial_state`), others by one rule.

    `initial_parameter` has the rule, with a parameter's place in `state_shapes`.

    Raises:
        TypeError: The seed is no integer.
        ValueError: The seed is out of its range (`random`).
    """
    if type(config) is DiTConfig:
        return dit.initial_state(config, seed=seed)
    state = {}
    for place, (name, shape) in enumerate(state_shapes(config).items()):
        if isinstance(config, MMDiTConfig) and name == mmdit.POSITIONS:
            state[name] = mmdit.positions(config)
        else:
            state[name] = initial_parameter(name, shape, seed=seed, place=place)
    return state


def initial_parameter(name: str, shape: tuple[int, ...], *, seed: int, place: int) -> torch.Tensor:
    """Draw one of the parameters with which training starts, float32, by one rule.

    Scales of norms are 1, biases 0. What a block is steered by, and what a model ends with, is 0, so that it predicts 0. Tables
    and tokens that nothing multiplies are normal with deviation 0.02. All other weights are uniform in +-1 / sqrt(fan-in).

    Args:
        name: Of the parameter in its model.
        shape: Of the parameter.
        seed: Of the run.
        place: Of the parameter among those that the run draws.

    Raises:
        TypeError: The seed is no integer.
        ValueError: The seed is out of its range (`random`).
    """
    key: dict[str, Any] = {"seed": seed, "step": 0, "example": place, "purpose": dit.INITIAL_WEIGHTS}
    if name.endswith(".bias") or ZERO_AT_FIRST.search(name):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    if "embedding_table" in name or name.endswith("_embedding.weight"):
        return 0.02 * random.normal(shape, **key)
    fan_in = math.prod(shape[-1:] if len(shape) == 3 else shape[1:])  # of three axes, the first is of experts
    return fan_in**-0.5 * (2 * random.uniform(shape, **key) - 1)


def operation(config: ImageModelConfig) -> Callable[..., Any]:
    """Return the reference of a model, a function of state and arrays."""
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
    noised: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    pooled_projections: torch.Tensor | None,
    *,
    config: ImageModelConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a model predicts, and its auxiliary loss.

    Args:
        model: The function of `operation`, without its state and config: takes arrays.
        noised: [batch_size, channels, height, width], floating.
        timesteps: [batch_size], float32 or float64, in [0, 1000].
        labels: [batch_size], integer in 0 .. num_classes; of DiT and DiT-MoE.
        encoder_hidden_states: [batch_size, text_length, width], dtype of noised; of the others.
        pooled_projections: [batch_size, width], dtype of noised; of Flux and MMDiT.
        config: The model.

    Returns:
        prediction: Like noised.
        auxiliary_loss: [], float32 (float64 for float64 images), 0 where the model has none.
    """
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
    return prediction, timesteps.new_zeros(())


def drop(
    labels: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    pooled_projections: torch.Tensor | None,
    is_dropped: torch.Tensor,
    *,
    config: ImageModelConfig,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return classes or texts without those that a model is not told: `num_classes` takes the place of a class, 0 that of a text.

    Args:
        labels, encoder_hidden_states, pooled_projections: As of `predict`.
        is_dropped: [batch_size], bool.
        config: The model.

    Returns:
        labels, encoder_hidden_states, pooled_projections: Those that there are, and None.
    """
    if labels is not None and isinstance(config, ClassModelConfig):
        labels = labels.long().masked_fill(is_dropped, config.num_classes)
    if encoder_hidden_states is not None:
        encoder_hidden_states = encoder_hidden_states * ~is_dropped[:, None, None]
    if pooled_projections is not None:
        pooled_projections = pooled_projections * ~is_dropped[:, None]
    return labels, encoder_hidden_states, pooled_projections


def _flux(
    model: Callable[..., torch.Tensor], noised: torch.Tensor, timesteps: torch.Tensor, texts: Any, pooled: Any
) -> torch.Tensor:
    """Give Flux its tokens and their places, and times in [0, 1]."""
    _, _, height, width = noised.shape
    guidance_B = torch.full_like(timesteps, GUIDANCE)
    places = flux.image_ids(noised), flux.text_ids(texts)
    tokens_BND = model(flux.pack_latents(noised), texts, pooled, timesteps / TIMESTEPS, guidance_B, *places)
    return flux.unpack_latents(tokens_BND, height=height, width=width)
