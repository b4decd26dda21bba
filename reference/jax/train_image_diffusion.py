"""One training step of an image diffusion model on rectified flow, told classes or texts.

The state of a run is that of `training`, whose `model.<name>` are named as in the model's reference. An example's noise, time
and whether it is told its class or text are drawn by (seed, step, example id, purpose), whatever batch, microbatch or rank it
is in.

Shapes: B batch_size, C channels, H and W height and width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import ImageDiffusionConfig, VAEConfig
from gaugeblock.reference.jax import image_models, objectives, random, timestep_sampling, training, vae
from gaugeblock.reference.jax.precision import at_least_float32

Tensors = dict[str, jax.Array]


@dataclass(frozen=True)
class Metrics:
    """As `gaugeblock.reference.torch.train_image_diffusion.Metrics`."""

    loss: jax.Array
    auxiliary_loss: jax.Array
    gradient_norm: jax.Array


def initial_state(config: ImageDiffusionConfig) -> Tensors:
    """As `gaugeblock.reference.torch.train_image_diffusion.initial_state`, but step is an int32."""
    parameters = image_models.initial_state(config.model, seed=config.seed)
    return training.initial_state(parameters, config=config, frozen=image_models.frozen_names(config.model))


def train_step(
    state: Mapping[str, jax.Array],
    images: jax.Array,
    labels: jax.Array,
    example_ids: jax.Array,
    *,
    config: ImageDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """As `gaugeblock.reference.torch.train_image_diffusion.train_step`."""
    validation.image_diffusion_step(state, images, labels, example_ids, config, image_models.state_shapes(config.model))
    return _step(state, (images, labels, None, None, example_ids), config)


def train_step_on_texts(
    state: Mapping[str, jax.Array],
    images: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array | None,
    example_ids: jax.Array,
    *,
    config: ImageDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """As `gaugeblock.reference.torch.train_image_diffusion.train_step_on_texts`."""
    texts = encoder_hidden_states, pooled_projections
    shapes, frozen = image_models.state_shapes(config.model), image_models.frozen_names(config.model)
    validation.image_diffusion_step_on_texts(state, images, *texts, example_ids, config, shapes, frozen)
    return _step(state, (images, None, *texts, example_ids), config)


def latents(
    state: Mapping[str, jax.Array],
    images: jax.Array,
    example_ids: jax.Array,
    step: int | jax.Array,
    *,
    seed: int,
    config: VAEConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.train_image_diffusion.latents`."""
    mean_BCHW, logvar_BCHW = vae.encode(state, images, config=config)
    return draw_latents(mean_BCHW, logvar_BCHW, example_ids, step, seed=seed, config=config)


def draw_latents(
    mean: jax.Array, logvar: jax.Array, example_ids: jax.Array, step: int | jax.Array, *, seed: int, config: VAEConfig
) -> jax.Array:
    """As `latents`, of what `vae.encode` returned."""
    key: dict[str, Any] = {"seed": seed, "step": step, "example": example_ids, "purpose": purposes.LATENT_NOISE}
    noise_BCHW = random.normal(mean.shape[1:], **key).astype(mean.dtype)
    return vae.scale_latents(vae.sample(mean, logvar, noise_BCHW), config=config)


def _step(state: Mapping[str, jax.Array], batch: tuple[Any, ...], config: ImageDiffusionConfig) -> tuple[Tensors, Metrics]:
    """Make the update of a batch that is known to be good."""
    new_state, metrics = training.step(shares, state, batch, config=config)
    return new_state, Metrics(**metrics)


def shares(
    parameters: Tensors, images: jax.Array, *others: Any, batch_size: int, step: jax.Array, config: ImageDiffusionConfig
) -> tuple[jax.Array, Tensors]:
    """As `gaugeblock.reference.torch.train_image_diffusion.shares`."""
    model = partial(image_models.operation(config.model), parameters, config=config.model)
    losses_B, auxiliary_loss = example_losses(model, images, *others, step=step, config=config)
    loss, auxiliary_loss = losses_B.sum() / batch_size, auxiliary_loss * len(images) / batch_size
    return loss + auxiliary_loss, {"loss": loss, "auxiliary_loss": auxiliary_loss}


def example_losses(
    model: Callable[..., Any],
    images: jax.Array,
    labels: jax.Array | None,
    encoder_hidden_states: jax.Array | None,
    pooled_projections: jax.Array | None,
    example_ids: jax.Array,
    *,
    step: jax.Array,
    config: ImageDiffusionConfig,
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_image_diffusion.example_losses`."""
    noise_BCHW, times_B, is_dropped_B = draws(images, example_ids, step, config=config)
    labels, *texts = image_models.drop(labels, encoder_hidden_states, pooled_projections, is_dropped_B, config=config.model)
    texts = [None if each is None else training.in_compute_dtype(each, config) for each in texts]

    noised_BCHW = training.in_compute_dtype(objectives.rectified_flow_interpolate(images, noise_BCHW, times_B), config)
    timesteps_B = objectives.TIMESTEPS * times_B
    prediction_BCHW, auxiliary_loss = image_models.predict(model, noised_BCHW, timesteps_B, labels, *texts, config=config.model)
    errors_BCHW = at_least_float32(prediction_BCHW) - target(images, noise_BCHW, config=config)
    return weights(times_B, config=config) * jnp.square(errors_BCHW).mean(axis=(1, 2, 3)), auxiliary_loss.astype(images.dtype)


def target(images: jax.Array, noise: jax.Array, *, config: ImageDiffusionConfig) -> jax.Array:
    """Return what is to be predicted, like images."""
    match config.prediction_type:
        case "flow_prediction":
            return objectives.rectified_flow_velocity(images, noise, velocity=config.velocity)
        case "epsilon":
            return noise
        case "sample":
            return images
    raise AssertionError(config.prediction_type)  # which the config rules out


def weights(times: jax.Array, *, config: ImageDiffusionConfig) -> jax.Array:
    """Return by how much the examples at these times count, [batch_size]."""
    if config.min_snr_gamma is None:
        return jnp.ones_like(times)
    return objectives.rectified_flow_min_snr_weights(
        times, prediction_type=config.prediction_type, gamma=config.min_snr_gamma, snr=config.snr
    )


def draws(
    images: jax.Array, example_ids: jax.Array, step: jax.Array, *, config: ImageDiffusionConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_image_diffusion.draws`."""
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids}
    noise_BCHW = random.normal(images.shape[1:], **key, purpose=purposes.TRAINING_NOISE)
    draw_time = random.normal if config.timestep_sampling == "logit-normal" else random.uniform
    times_B = draw_time((), **key, purpose=purposes.TRAINING_TIMES).astype(images.dtype)
    is_dropped_B = random.uniform((), **key, purpose=purposes.LABEL_DROPOUT) < config.label_dropout
    return noise_BCHW.astype(images.dtype), _sampled(times_B, config), is_dropped_B


def _sampled(drawn: jax.Array, config: ImageDiffusionConfig) -> jax.Array:
    """Make times of what was drawn for them."""
    match config.timestep_sampling:
        case "uniform":
            return drawn
        case "logit-normal":
            return timestep_sampling.logit_normal_times(drawn)
        case "mode":
            return timestep_sampling.mode_times(drawn)
        case _:
            places_B = timestep_sampling.biased_timesteps(
                drawn,
                num_timesteps=objectives.TIMESTEPS,
                bias=config.timestep_sampling,
                multiplier=config.bias_multiplier,
                portion=config.bias_portion,
            )
            return places_B.astype(drawn.dtype) / objectives.TIMESTEPS
