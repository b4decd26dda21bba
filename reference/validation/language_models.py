"""Calls of the masked and block diffusion language models."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference import decoder_states
from gaugeblock.reference.configs import DreamConfig, LLaDAConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.validation.arrays import (
    require_dtype,
    require_like,
    require_same_device,
    require_shape,
    require_values,
    state_of_one_dtype,
)

Shapes = Mapping[str, tuple[int, ...]]


def language_model_config(config: Any, *classes: type) -> None:
    """Check that a config is of one of these classes."""
    if not isinstance(config, classes):
        names = " or ".join(each.__name__ for each in classes)
        raise TypeError(f"config must be {names}, got {type(config).__name__}")


def llada(state: Any, input_ids: Any, attention_mask: Any = None, *, config: Any) -> None:
    """Check the arguments of `llada.llada`."""
    language_model_config(config, LLaDAConfig)
    _masked(state, input_ids, attention_mask, config, decoder_states.llada_shapes(config))


def dream(state: Any, input_ids: Any, attention_mask: Any = None, *, config: Any) -> None:
    """Check the arguments of `dream.dream`."""
    language_model_config(config, DreamConfig)
    _masked(state, input_ids, attention_mask, config, decoder_states.state_shapes(config))


def sdar(state: Any, input_ids: Any, *, config: Any) -> None:
    """Check the arguments of `sdar.sdar`."""
    language_model_config(config, SDARConfig)
    _masked(state, input_ids, None, config, decoder_states.state_shapes(config))


def sdar_moe(state: Any, input_ids: Any, *, config: Any) -> None:
    """Check the arguments of `sdar.sdar_moe`."""
    language_model_config(config, SDARMoEConfig)
    _masked(state, input_ids, None, config, decoder_states.state_shapes(config))


def sdar_cached(state: Any, input_ids: Any, past_keys: Any, past_values: Any, *, config: Any) -> None:
    """Check the arguments of `sdar.sdar_cached`."""
    language_model_config(config, SDARConfig, SDARMoEConfig)
    shapes = decoder_states.state_shapes(config)
    _masked(state, input_ids, None, config, shapes)
    sizes = {
        "num_hidden_layers": config.num_hidden_layers,
        "batch_size": input_ids.shape[0],
        "num_key_value_heads": config.num_key_value_heads,
        "num_past_tokens": None,
        "head_dim": config.head_dim,
    }
    first = next(iter(shapes))
    require_like("past_keys", past_keys, f"state[{first!r}]", state[first], **sizes)
    num_past_tokens = past_keys.shape[3]
    if num_past_tokens % config.block_length:
        length = f"block_length={config.block_length}, got {num_past_tokens}"
        raise ValueError(f"past_keys must have a number of tokens that is a multiple of {length}")
    require_like("past_values", past_values, "past_keys", past_keys, **sizes | {"num_past_tokens": num_past_tokens})


def sdar_training(state: Any, noisy_ids: Any, clean_ids: Any, sample_ids: Any, *, config: Any) -> None:
    """Check the arguments of `sdar.sdar_training`."""
    language_model_config(config, SDARConfig, SDARMoEConfig)
    _ids("noisy_ids", noisy_ids)
    batch_size, num_tokens = noisy_ids.shape
    for name, ids in (("clean_ids", clean_ids), ("sample_ids", sample_ids)):
        require_dtype(name, ids, ("int32", "int64"))
        require_shape(name, ids, batch_size=batch_size, num_tokens=num_tokens)
        require_same_device(name, ids, "noisy_ids", noisy_ids)
    state_of_one_dtype(state, decoder_states.state_shapes(config), "noisy_ids", noisy_ids)
    for name, ids in (("noisy_ids", noisy_ids), ("clean_ids", clean_ids)):
        require_values(name, ids, config.vocab_size - 1)


def _masked(state: Any, input_ids: Any, attention_mask: Any, config: Any, shapes: Shapes) -> None:
    _ids("input_ids", input_ids)
    batch_size, num_tokens = input_ids.shape
    if attention_mask is not None:
        require_dtype("attention_mask", attention_mask, ("bool",))
        require_shape("attention_mask", attention_mask, batch_size=batch_size, num_tokens=num_tokens)
        require_same_device("attention_mask", attention_mask, "input_ids", input_ids)
    state_of_one_dtype(state, shapes, "input_ids", input_ids)
    require_values("input_ids", input_ids, config.vocab_size - 1)


def _ids(name: str, ids: Any) -> None:
    require_dtype(name, ids, ("int32", "int64"))
    require_shape(name, ids, batch_size=None, num_tokens=None)
    if ids.shape[1] < 1:
        raise ValueError(f"{name} must have one token at least, got {tuple(ids.shape)}")
