"""Calls of CLIP's text encoder."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import LEGACY_EOS_TOKEN_ID, CLIPTextConfig
from gaugeblock.reference.validation.arrays import (
    require_dtype,
    require_in_rows,
    require_same_device,
    require_shape,
    require_values,
    state_of_one_dtype,
)


def clip_text(
    state: Any, input_ids: Any, attention_mask: Any, config: CLIPTextConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the arguments of `clip_text.clip_text`, whose parameters have these shapes; the ids stay unread."""
    require_dtype("input_ids", input_ids, ("int32", "int64"))
    require_shape("input_ids", input_ids, batch_size=None, num_tokens=None)
    batch_size, num_tokens = input_ids.shape
    if not 1 <= num_tokens <= config.max_position_embeddings:
        raise ValueError(f"input_ids must have 1..{config.max_position_embeddings} tokens, got {num_tokens}")
    if attention_mask is not None:
        require_dtype("attention_mask", attention_mask, ("bool",))
        require_shape("attention_mask", attention_mask, batch_size=batch_size, num_tokens=num_tokens)
        require_same_device("attention_mask", attention_mask, "input_ids", input_ids)
    state_of_one_dtype(state, shapes, "input_ids", input_ids)


def clip_input_ids_in_range(input_ids: Any, config: CLIPTextConfig) -> None:
    """Check that every id names a token and every caption ends, unless they cannot be read, like `expert_ids_in_range`."""
    require_values("input_ids", input_ids, config.vocab_size - 1)
    if config.eos_token_id != LEGACY_EOS_TOKEN_ID:
        require_in_rows("input_ids", input_ids, "eos_token_id", config.eos_token_id)


def clip_position_ids(position_ids: Any, max_position_embeddings: int) -> None:
    """Check a checkpoint's ids of places, but for their values."""
    require_shape("state['text_model.embeddings.position_ids']", position_ids, one=1, places=max_position_embeddings)
