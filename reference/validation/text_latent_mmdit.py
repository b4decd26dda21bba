"""Calls of the text-latent MMDiT."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import TextLatentMMDiTConfig
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_dtype,
    require_same_device,
    require_shape,
    require_values,
    state_entries,
)


def text_latent_mmdit(
    state: Any,
    text_tokens: Any,
    latents: Any,
    text_timesteps: Any,
    latent_timesteps: Any,
    attention_mask: Any,
    config: TextLatentMMDiTConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check the arguments of `text_latent_mmdit.text_latent_mmdit`, whose parameters have these shapes; the ids stay unread."""
    require_text("text_tokens", text_tokens, attention_mask, config)
    batch_size = text_tokens.shape[0]
    require_dtype("latents", latents, FLOATING)
    require_shape("latents", latents, batch_size=batch_size, latent_dim=config.latent_dim)
    require_same_device("latents", latents, "text_tokens", text_tokens)
    for name, times in (("text_timesteps", text_timesteps), ("latent_timesteps", latent_timesteps)):
        require_dtype(name, times, ("float32", "float64"))
        require_shape(name, times, batch_size=batch_size)
        require_same_device(name, times, "text_tokens", text_tokens)
    state_entries(state, shapes, like=latents)


def require_text(name: str, text_tokens: Any, attention_mask: Any, config: TextLatentMMDiTConfig) -> None:
    """Check the tokens of texts and what of them is no padding; the ids stay unread."""
    require_dtype(name, text_tokens, ("int32", "int64"))
    require_shape(name, text_tokens, batch_size=None, num_tokens=None)
    batch_size, num_tokens = text_tokens.shape
    if not 1 <= num_tokens <= config.max_seq_len:
        raise ValueError(f"{name} must have 1..{config.max_seq_len} tokens, got {num_tokens}")
    if attention_mask is not None:
        require_dtype("attention_mask", attention_mask, ("bool",))
        require_shape("attention_mask", attention_mask, batch_size=batch_size, num_tokens=num_tokens)
        require_same_device("attention_mask", attention_mask, name, text_tokens)


def text_latent_tokens_in_range(text_tokens: Any, config: TextLatentMMDiTConfig, *, name: str = "text_tokens") -> None:
    """Check that every id names a token, unless they cannot be read, like `expert_ids_in_range`."""
    require_values(name, text_tokens, config.vocab_size - 1)
