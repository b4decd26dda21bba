"""Language models as a training step sees them: of noisy and clean tokens, what a model predicts at each place.

Shapes: as in `decoder`, V vocab_size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gaugeblock.reference import states
from gaugeblock.reference.configs import DreamConfig, LanguageModelConfig, LLaDAConfig
from gaugeblock.reference.torch import dit, dream, llada, random, sdar

INITIAL_DEVIATION = 0.02  # initializer_range of transformers' Qwen2, Qwen3 and Llama


def state_shapes(config: LanguageModelConfig) -> states.Shapes:
    """Return the shapes of a model's parameters by name."""
    match config:
        case LLaDAConfig():
            return llada.state_shapes(config)
        case DreamConfig():
            return dream.state_shapes(config)
        case _:
            return sdar.state_shapes(config)


def initial_state(config: LanguageModelConfig, *, seed: int) -> dict[str, torch.Tensor]:
    """Draw the parameters with which training starts, float32: norms are 1, biases 0, all others normal with deviation 0.02.

    Raises:
        TypeError: The seed is no integer.
        ValueError: The seed is out of its range (`random`).

    Source: transformers' Qwen2, Qwen3, Qwen3-MoE and Llama.
    """
    state = {}
    for place, (name, shape) in enumerate(state_shapes(config).items()):
        key: dict[str, Any] = {"seed": seed, "step": 0, "example": place, "purpose": dit.INITIAL_WEIGHTS}
        if len(shape) == 1:
            state[name] = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
        else:
            state[name] = INITIAL_DEVIATION * random.normal(shape, **key)
    return state


def operation(config: LanguageModelConfig) -> Callable[..., torch.Tensor]:
    """Return the reference of a model, a function of state and arrays; of SDAR's that of training."""
    match config:
        case LLaDAConfig():
            return partial(llada.llada, config=config)
        case DreamConfig():
            return partial(dream.dream, config=config)
        case _:
            return partial(sdar.sdar_training, config=config)


def predict(
    model: Callable[..., torch.Tensor],
    noisy_ids: torch.Tensor,
    clean_ids: torch.Tensor,
    sample_ids: torch.Tensor,
    *,
    config: LanguageModelConfig,
) -> torch.Tensor:
    """Return logits of the token at each place of noisy sequences.

    LLaDA and Dream are told of samples only which tokens are padding: a token sees those of all samples of its sequence.

    Args:
        model: The function of `operation`, without its state: takes arrays.
        noisy_ids: [batch_size, num_tokens], integer in 0 .. vocab_size - 1.
        clean_ids: Like noisy_ids, the tokens that are behind masks.
        sample_ids: [batch_size, num_tokens], integer, negative for padding.
        config: The model.

    Returns:
        [batch_size, num_tokens, vocab_size], dtype of the state.
    """
    if isinstance(config, LLaDAConfig | DreamConfig):
        return model(noisy_ids, sample_ids >= 0)
    return model(noisy_ids, clean_ids, sample_ids)
