"""Calls of the training step of text-latent diffusion with cycles."""

from collections.abc import Container, Mapping
from typing import Any

from gaugeblock.reference.configs import CycleVAEConfig
from gaugeblock.reference.validation.arrays import INTEGER, require_dtype, require_same_device, require_shape
from gaugeblock.reference.validation.text_latent_mmdit import require_text, text_latent_tokens_in_range
from gaugeblock.reference.validation.training import training_state

Shapes = Mapping[str, tuple[int, ...]]


def cycle_vae_step(
    state: Any,
    input_ids: Any,
    latents: Any,
    attention_mask: Any,
    example_ids: Any,
    config: CycleVAEConfig,
    shapes: Shapes,
    frozen: Container[str],
) -> None:
    """Check the arguments of `train_cycle_vae.train_step`, whose model has parameters of these shapes."""
    cycle_vae_batch(input_ids, latents, attention_mask, example_ids, config)
    if input_ids.shape[0] == 0:
        raise ValueError(f"latents must hold at least one example, got {tuple(latents.shape)}")
    training_state(state, shapes, config, frozen=frozen, like=latents)


def cycle_vae_batch(input_ids: Any, latents: Any, attention_mask: Any, example_ids: Any, config: CycleVAEConfig) -> None:
    """Check a batch, or one rank's part of it, which may hold no example."""
    require_text("input_ids", input_ids, attention_mask, config.model)
    batch_size = input_ids.shape[0]
    text_latent_tokens_in_range(input_ids, config.model, name="input_ids")
    require_dtype("latents", latents, ("float32", "float64"))
    require_shape("latents", latents, batch_size=batch_size, latent_dim=config.model.latent_dim)
    require_same_device("latents", latents, "input_ids", input_ids)
    require_dtype("example_ids", example_ids, (*INTEGER, "uint32"))
    require_shape("example_ids", example_ids, batch_size=batch_size)
    require_same_device("example_ids", example_ids, "input_ids", input_ids)
