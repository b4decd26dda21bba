"""One training step of Stable Diffusion 1, 2 or XL: a UNet that is told captions, and its text encoders if these are trained.

The state of a run is that of `training`; its `model.<name>` are `unet.<name>` and, of text encoders that are trained,
`text_encoder.<name>` and `text_encoder_2.<name>`, named as in their references. What is not trained, the VAE's encoder and else
the text encoders, is an argument of its own: a run that is saved then holds what it has changed, and an average has no copies of
what stays. An example's noise, timestep and whether it is told its caption are drawn by (seed, step, example id, purpose),
whatever batch, microbatch or rank it is in.

Shapes: B batch_size, C channels, H and W height and width, S tokens of a caption, D cross_attention_dim, V pooled_size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import purposes, states, unet_states, validation
from gaugeblock.reference.configs import StableDiffusionConfig
from gaugeblock.reference.jax import (
    clip_text,
    image_models,
    noise_schedules,
    predictions,
    random,
    timestep_sampling,
    train_image_diffusion,
    training,
    unet,
    vae,
)
from gaugeblock.reference.jax.precision import at_least_float32

Tensors = dict[str, jax.Array]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Metrics:
    """As `gaugeblock.reference.torch.train_stable_diffusion.Metrics`."""

    loss: jax.Array
    gradient_norm: jax.Array


def initial_state(config: StableDiffusionConfig) -> Tensors:
    """As `gaugeblock.reference.torch.train_stable_diffusion.initial_state`, but step is an int32."""
    parameters: Tensors = {}
    for name, shape in state_shapes(config).items():
        _, _, own_name = name.partition(".")
        parameters[name] = image_models.initial_parameter(own_name, shape, seed=config.seed, place=len(parameters))
    return state_of(parameters, config=config)


def state_of(parameters: Mapping[str, jax.Array], *, config: StableDiffusionConfig) -> Tensors:
    """Return the state at the start of a run with these parameters, of the names in `state_shapes`."""
    return training.initial_state(parameters, config=config, frozen=unused_names(config))


def train_step(
    state: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    images: jax.Array,
    input_ids: jax.Array,
    time_ids: jax.Array,
    example_ids: jax.Array,
    *,
    config: StableDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """As `gaugeblock.reference.torch.train_stable_diffusion.train_step`."""
    shapes = state_shapes(config), frozen_shapes(config), unused_names(config)
    validation.stable_diffusion_step(state, frozen, images, input_ids, time_ids, example_ids, config, *shapes)
    latents_BCHW = encode_images(dict(frozen), images, example_ids, state["step"], config=config)
    if config.train_text_encoder:
        return _step(state, (latents_BCHW, input_ids, None, None, time_ids, example_ids), config)
    texts = encode_texts(dict(frozen), input_ids, config=config)
    return _step(state, (latents_BCHW, None, *texts, time_ids, example_ids), config)


def train_step_on_embeddings(
    state: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    images: jax.Array,
    encoder_hidden_states: jax.Array,
    text_embeds: jax.Array | None,
    time_ids: jax.Array,
    example_ids: jax.Array,
    *,
    config: StableDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """As `gaugeblock.reference.torch.train_stable_diffusion.train_step_on_embeddings`."""
    texts = encoder_hidden_states, text_embeds
    shapes = state_shapes(config), frozen_shapes(config, with_text_encoders=False)
    validation.stable_diffusion_step_on_embeddings(state, frozen, images, *texts, time_ids, example_ids, config, *shapes)
    latents_BCHW = encode_images(dict(frozen), images, example_ids, state["step"], config=config)
    return _step(state, (latents_BCHW, None, *texts, time_ids, example_ids), config)


@partial(jax.jit, static_argnames="config")
def encode_images(
    frozen: Mapping[str, jax.Array],
    images: jax.Array,
    example_ids: jax.Array,
    step: jax.Array,
    *,
    config: StableDiffusionConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.train_stable_diffusion.encode_images`."""
    if config.vae is None:
        return images
    parameters = states.part(frozen, "vae")
    return train_image_diffusion.latents(parameters, images, example_ids, step, seed=config.seed, config=config.vae)


@partial(jax.jit, static_argnames="config")
def encode_texts(
    frozen: Mapping[str, jax.Array], input_ids: jax.Array, *, config: StableDiffusionConfig
) -> tuple[jax.Array, jax.Array | None]:
    """As `gaugeblock.reference.torch.train_stable_diffusion.encode_texts`, but ids stay unread."""
    return tell_texts(clip_text.clip_text, frozen, input_ids, config=config)


def tell_texts(
    encode: Function, parameters: Mapping[str, jax.Array], input_ids: jax.Array, *, config: StableDiffusionConfig
) -> tuple[jax.Array, jax.Array | None]:
    """As `encode_texts`, but differentiable, and by a function like `clip_text.clip_text`."""
    hidden_states, pooled_BV = [], None
    for index, (name, encoder) in enumerate(zip(config.text_encoder_names, config.text_encoders, strict=True)):
        hidden_BSD, pooled_BV = encode(states.part(parameters, name), input_ids[:, index], config=encoder)
        hidden_states.append(hidden_BSD)
    return jnp.concatenate(hidden_states, axis=2), pooled_BV if config.is_told_sizes else None


def _step(state: Mapping[str, jax.Array], batch: tuple[Any, ...], config: StableDiffusionConfig) -> tuple[Tensors, Metrics]:
    """Make the update of a batch that is known to be good."""
    new_state, metrics = training.step(shares, state, batch, config=config)
    return new_state, Metrics(**metrics)


def shares(
    parameters: Tensors, latents: jax.Array, *others: Any, batch_size: int, step: jax.Array, config: StableDiffusionConfig
) -> tuple[jax.Array, Tensors]:
    """As `gaugeblock.reference.torch.train_stable_diffusion.shares`."""
    model = partial(predict, clip_text.clip_text, denoiser(config), parameters, config=config)
    loss = example_losses(model, latents, *others, step=step, config=config).sum() / batch_size
    return loss, {"loss": loss}


def example_losses(
    model: Function,
    latents: jax.Array,
    input_ids: jax.Array | None,
    encoder_hidden_states: jax.Array | None,
    text_embeds: jax.Array | None,
    time_ids: jax.Array,
    example_ids: jax.Array,
    *,
    step: jax.Array,
    config: StableDiffusionConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.train_stable_diffusion.example_losses`."""
    noise_BCHW, added_BCHW, timesteps_B, is_dropped_B = draws(latents, example_ids, step, config=config)
    alphas_B, sigmas_B, weights_B = (each.astype(latents.dtype) for each in rates(timesteps_B, config=config))
    noised_BCHW = training.in_compute_dtype(predictions.add_noise(latents, added_BCHW, alphas_B, sigmas_B), config)
    texts = (None if each is None else training.in_compute_dtype(each, config) for each in (encoder_hidden_states, text_embeds))

    prediction_BCHW = model(noised_BCHW, timesteps_B.astype(latents.dtype), input_ids, *texts, time_ids, is_dropped_B)
    kind = config.schedule.prediction_type
    target_BCHW = predictions.prediction_target(latents, noise_BCHW, alphas_B, sigmas_B, prediction_type=kind)
    errors_BCHW = at_least_float32(prediction_BCHW) - target_BCHW
    return weights_B * jnp.square(errors_BCHW).mean(axis=(1, 2, 3))


def predict(
    encode: Function,
    denoise: Function,
    parameters: Mapping[str, jax.Array],
    noised: jax.Array,
    timesteps: jax.Array,
    input_ids: jax.Array | None,
    encoder_hidden_states: jax.Array | None,
    text_embeds: jax.Array | None,
    time_ids: jax.Array,
    is_dropped: jax.Array,
    *,
    config: StableDiffusionConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.train_stable_diffusion.predict`."""
    texts = encoder_hidden_states, text_embeds
    if input_ids is not None:
        texts = tell_texts(encode, parameters, input_ids, config=config)
    _, *told = image_models.drop(None, *texts, is_dropped, config=config.unet)
    told = [*told, time_ids] if config.is_told_sizes else told[:1]
    return denoise(states.part(parameters, "unet"), noised, timesteps, *told, config=config.unet)


def denoiser(config: StableDiffusionConfig) -> Function:
    """Return the UNet that takes what this run has."""
    return unet.unet_text_time if config.is_told_sizes else unet.unet


def draws(
    latents: jax.Array, example_ids: jax.Array, step: jax.Array, *, config: StableDiffusionConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_stable_diffusion.draws`."""
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids}
    noise_BCHW = random.normal(latents.shape[1:], **key, purpose=purposes.TRAINING_NOISE).astype(latents.dtype)
    offset_BC11 = random.normal((latents.shape[1], 1, 1), **key, purpose=purposes.NOISE_OFFSET).astype(latents.dtype)
    noise_BCHW = noise_BCHW + config.noise_offset * offset_BC11
    more_BCHW = random.normal(latents.shape[1:], **key, purpose=purposes.INPUT_PERTURBATION).astype(latents.dtype)
    timesteps_B = timestep_sampling.biased_timesteps(
        random.uniform((), **key, purpose=purposes.TRAINING_TIMES),
        num_timesteps=config.schedule.num_train_timesteps,
        bias=config.timestep_bias,
        multiplier=config.bias_multiplier,
        portion=config.bias_portion,
        begin=config.bias_begin,
        end=config.bias_end,
    )
    is_dropped_B = random.uniform((), **key, purpose=purposes.LABEL_DROPOUT) < config.text_dropout
    return noise_BCHW, noise_BCHW + config.input_perturbation * more_BCHW, timesteps_B, is_dropped_B


def rates(timesteps: jax.Array, *, config: StableDiffusionConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.train_stable_diffusion.rates`."""
    with jax.enable_x64(True):
        alphas_cumprod_B = noise_schedules.alphas_cumprod(config.schedule)[timesteps]
        alphas_B, sigmas_B = noise_schedules.signal_and_noise(alphas_cumprod_B)
        if config.snr_gamma is None:
            return alphas_B, sigmas_B, jnp.ones_like(alphas_B)
        snr_B = noise_schedules.signal_to_noise(alphas_cumprod_B)
        kind = config.schedule.prediction_type
        return alphas_B, sigmas_B, predictions.min_snr_weights(snr_B, prediction_type=kind, gamma=config.snr_gamma)


def state_shapes(config: StableDiffusionConfig) -> states.Shapes:
    """Return the shapes of what a state has of the model, by name: the UNet, and the text encoders if they are trained."""
    shapes = states.under("unet", unet_states.state_shapes(config.unet))
    return shapes | (text_encoder_shapes(config) if config.train_text_encoder else {})


def frozen_shapes(config: StableDiffusionConfig, *, with_text_encoders: bool = True) -> states.Shapes:
    """Return the shapes of what is not trained, by name: the VAE's encoder, and the text encoders unless they are."""
    shapes = {} if config.vae is None else states.under("vae", vae.encoder_shapes(config.vae))
    return shapes | (text_encoder_shapes(config) if with_text_encoders and not config.train_text_encoder else {})


def text_encoder_shapes(config: StableDiffusionConfig) -> states.Shapes:
    """Return the shapes of the text encoders' parameters by name."""
    encoders = zip(config.text_encoder_names, config.text_encoders, strict=True)
    return states.of_modules({name: clip_text.state_shapes(encoder) for name, encoder in encoders})


def unused_names(config: StableDiffusionConfig) -> tuple[str, ...]:
    """As `gaugeblock.reference.torch.train_stable_diffusion.unused_names`."""
    names: list[str] = []
    for index, (name, encoder) in enumerate(zip(config.text_encoder_names, config.text_encoders, strict=True)):
        is_pooled = config.is_told_sizes and index + 1 == len(config.text_encoders)
        if is_pooled or not config.train_text_encoder:
            continue
        returned = range(encoder.num_hidden_layers + 1)[encoder.returned_layer]
        layers = [f"text_model.encoder.layers.{layer}." for layer in range(returned, encoder.num_hidden_layers)]
        norm = [] if encoder.normalize_returned else ["text_model.final_layer_norm."]
        unused = ("text_projection.", *layers, *norm)
        names += [f"{name}.{each}" for each in clip_text.state_shapes(encoder) if each.startswith(unused)]
    return tuple(names)
