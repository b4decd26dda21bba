"""Calls of AutoencoderKL."""

from collections.abc import Mapping
from typing import Any

from gaugeblock.reference.configs import VAEConfig
from gaugeblock.reference.validation.arrays import FLOATING, require_dtype, require_like, require_shape, state_entries

Shapes = Mapping[str, tuple[int, ...]]


def vae_encode(state: Any, images: Any, config: VAEConfig, shapes: Shapes, others: Shapes) -> None:
    """Check the arguments of `vae.encode`, whose parameters have these shapes; those of the decoder may be there."""
    require_dtype("images", images, FLOATING)
    require_shape("images", images, batch_size=None, in_channels=config.in_channels, height=None, width=None)
    if min(images.shape[2:]) < config.downsampling:
        raise ValueError(f"images must be at least {config.downsampling} pixels high and wide, got {tuple(images.shape)}")
    half_of_state(state, shapes, others, images)


def vae_decode(state: Any, latents: Any, config: VAEConfig, shapes: Shapes, others: Shapes) -> None:
    """Check the arguments of `vae.decode`, whose parameters have these shapes; those of the encoder may be there."""
    vae_latents(latents, config)
    half_of_state(state, shapes, others, latents)


def vae_latents(latents: Any, config: VAEConfig) -> None:
    """Check latents of an autoencoder, which are not empty."""
    require_dtype("latents", latents, FLOATING)
    require_shape("latents", latents, batch_size=None, latent_channels=config.latent_channels, height=None, width=None)
    if min(latents.shape[2:]) < 1:
        raise ValueError(f"latents must be at least 1 place high and wide, got {tuple(latents.shape)}")


def vae_sample(mean: Any, logvar: Any, noise: Any) -> None:
    """Check the arguments of `vae.sample`."""
    require_dtype("mean", mean, FLOATING)
    require_shape("mean", mean, batch_size=None, latent_channels=None, height=None, width=None)
    names = ("batch_size", "latent_channels", "height", "width")
    for name, array in (("logvar", logvar), ("noise", noise)):
        require_like(name, array, "mean", mean, **dict(zip(names, mean.shape, strict=True)))


def half_of_state(state: Any, shapes: Shapes, others: Shapes, like: Any) -> None:
    """Check the entries of these shapes; `others` may be there too, and are not looked at."""
    if isinstance(state, Mapping):
        state = {name: entry for name, entry in state.items() if name not in others}
    state_entries(state, shapes, like=like)
