"""Calls of the upcycled GPT-2."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import UpcycledGPT2Config
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_dtype,
    require_same_device,
    require_shape,
    require_values,
    state_of_one_dtype,
)


def upcycled_gpt2_config(config: Any) -> None:
    """Check that a config is one of an upcycled GPT-2."""
    if not isinstance(config, UpcycledGPT2Config):
        raise TypeError(f"config must be UpcycledGPT2Config, got {type(config).__name__}")


def upcycled_gpt2(
    state: Any, input_ids: Any, noise: Any, config: UpcycledGPT2Config, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the arguments of `upcycled_gpt2.upcycled_gpt2`, whose parameters have these shapes; the ids stay unread."""
    token_sequences(input_ids, config)
    batch_size, num_tokens = input_ids.shape
    require_dtype("noise", noise, FLOATING)
    sizes = {"num_moe_layers": len(config.moe_layers), "num_experts": config.num_experts}
    require_shape("noise", noise, batch_size=batch_size, num_tokens=num_tokens, **sizes)
    require_same_device("noise", noise, "input_ids", input_ids)
    state_of_one_dtype(state, shapes, "input_ids", input_ids)


def token_sequences(input_ids: Any, config: UpcycledGPT2Config) -> None:
    """Check sequences of tokens, but for their values."""
    require_dtype("input_ids", input_ids, ("int32", "int64"))
    require_shape("input_ids", input_ids, batch_size=None, num_tokens=None)
    num_tokens = input_ids.shape[1]
    if not 1 <= num_tokens <= config.max_position_embeddings:
        raise ValueError(f"input_ids must have 1..{config.max_position_embeddings} tokens, got {num_tokens}")


def gpt2_input_ids_in_range(input_ids: Any, config: UpcycledGPT2Config) -> None:
    """Check that every id names a token, unless they cannot be read, like `expert_ids_in_range`."""
    require_values("input_ids", input_ids, config.vocab_size - 1)
