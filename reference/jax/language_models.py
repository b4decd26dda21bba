"""Language models as a training step sees them: of noisy and clean tokens, what a model predicts at each place.

Shapes: as in `decoder`, V vocab_size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import states
from gaugeblock.reference.configs import DreamConfig, LanguageModelConfig, LLaDAConfig
from gaugeblock.reference.jax import dit, dream, llada, random, sdar

INITIAL_DEVIATION = 0.02  # initializer_range of transformers' Qwen2, Qwen3 and Llama


def state_shapes(config: LanguageModelConfig) -> states.Shapes:
    """As `gaugeblock.reference.torch.language_models.state_shapes`."""
    match config:
        case LLaDAConfig():
            return llada.state_shapes(config)
        case DreamConfig():
            return dream.state_shapes(config)
        case _:
            return sdar.state_shapes(config)


def initial_state(config: LanguageModelConfig, *, seed: int) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.language_models.initial_state`."""
    state = {}
    for place, (name, shape) in enumerate(state_shapes(config).items()):
        key: dict[str, Any] = {"seed": seed, "step": 0, "example": place, "purpose": dit.INITIAL_WEIGHTS}
        if len(shape) == 1:
            state[name] = jnp.zeros(shape) if name.endswith(".bias") else jnp.ones(shape)
        else:
            state[name] = INITIAL_DEVIATION * random.normal(shape, **key)
    return state


def operation(config: LanguageModelConfig) -> Callable[..., jax.Array]:
    """As `gaugeblock.reference.torch.language_models.operation`."""
    match config:
        case LLaDAConfig():
            return partial(llada.llada, config=config)
        case DreamConfig():
            return partial(dream.dream, config=config)
        case _:
            return partial(sdar.sdar_training, config=config)


def predict(
    model: Callable[..., jax.Array],
    noisy_ids: jax.Array,
    clean_ids: jax.Array,
    sample_ids: jax.Array,
    *,
    config: LanguageModelConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.language_models.predict`."""
    if isinstance(config, LLaDAConfig | DreamConfig):
        return model(noisy_ids, sample_ids >= 0)
    return model(noisy_ids, clean_ids, sample_ids)
