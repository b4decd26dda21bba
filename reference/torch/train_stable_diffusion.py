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

import torch

from gaugeblock.reference import purposes, states, unet_states, validation
from gaugeblock.reference.configs import StableDiffusionConfig
from gaugeblock.reference.torch import (
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
from gaugeblock.reference.torch.precision import at_least_float32

Tensors = dict[str, torch.Tensor]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Metrics:
    """What a step reports, before the update.

    Attributes:
        loss: [], the mean over the examples of the batch.
        gradient_norm: [], the norm of all gradients together, before clipping.
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor


def initial_state(config: StableDiffusionConfig) -> Tensors:
    """Return the state at the start of a run: a new model, moments of zero, step 0; float32, and an int64 step.

    Parameters are drawn as `image_models.initial_parameter` says. A run that goes on with others begins with `state_of`.
    """
    parameters: Tensors = {}
    for name, shape in state_shapes(config).items():
        _, _, own_name = name.partition(".")
        parameters[name] = image_models.initial_parameter(own_name, shape, seed=config.seed, place=len(parameters))
    return state_of(parameters, config=config)


def state_of(parameters: Mapping[str, torch.Tensor], *, config: StableDiffusionConfig) -> Tensors:
    """Return the state at the start of a run with these parameters, of the names in `state_shapes`."""
    return training.initial_state(parameters, config=config, frozen=unused_names(config))


def train_step(
    state: Mapping[str, torch.Tensor],
    frozen: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    input_ids: torch.Tensor,
    time_ids: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: StableDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """Make one update on the mean loss of a batch of images and captions; the given state is not written to.

        latents            = (draw of vae(image) - shift_factor) * scaling_factor
        t, noise, dropped  = draws of each example, as well as more noise
        x                  = sqrt(alphas_cumprod[t]) * latents + sqrt(1 - alphas_cumprod[t]) * (noise + input_perturbation * more)
        text, pooled       = 0 where dropped, else what the text encoders make of the caption
        error              = unet(x, t, text, pooled, time_ids) - target of latents and noise
        loss               = mean over b of weight(t[b]) * mean of error[b]**2
        new_state          = update of the optimizer by the clipped gradients of loss (`training.update`)

    Text encoders that are not trained encode the whole batch at once: the same bits as if `encode_texts` had done so before.

    Args:
        state: As above; float32 or float64, with an integer step.
        frozen: The parameters that are not trained, shapes as in `frozen_shapes`, dtype of the state.
        images: [batch_size, in_channels, height, width], dtype of the state, in [-1, 1]; scaled latents where config.vae is None.
        input_ids: [batch_size, num_encoders, num_tokens], int32 or int64: the caption as each encoder's tokenizer has it.
        time_ids: [batch_size, num_time_ids], dtype of the state: of XL, the image's height and width, top and left of the crop,
            height and width that are wanted. num_time_ids is 0 for a UNet without added embeddings.
        example_ids: [batch_size], integer in 0..2**32 - 1; examples with the same id get the same draws.
        config: Of the run.

    Returns:
        new_state: As state.
        metrics: In the dtype of the state.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `state` or `frozen` is not a dict of arrays.
        ValueError: Shapes or devices do not fit together, `state` or `frozen` lacks an entry or has one too many, an id names no
            token, or the config has no text encoders.
        FloatingPointError: The loss or a gradient is not finite; the message names the step and the first bad one.

    Source: Rombach et al. (arXiv:2112.10752), section 3.3; Podell et al. (arXiv:2307.01952), section 2; weights: Hang et al.
    (arXiv:2303.09556), section 3.4; what is dropped: Ho and Salimans (arXiv:2207.12598), algorithm 1; diffusers'
    train_text_to_image.py, train_text_to_image_sdxl.py and train_dreambooth.py.
    """
    shapes = state_shapes(config), frozen_shapes(config), unused_names(config)
    validation.stable_diffusion_step(state, frozen, images, input_ids, time_ids, example_ids, config, *shapes)
    latents_BCHW = encode_images(frozen, images, example_ids, int(state["step"]), config=config)
    if config.train_text_encoder:
        return _step(state, (latents_BCHW, input_ids, None, None, time_ids, example_ids), config)
    texts = encode_texts(frozen, input_ids, config=config)
    return _step(state, (latents_BCHW, None, *texts, time_ids, example_ids), config)


def train_step_on_embeddings(
    state: Mapping[str, torch.Tensor],
    frozen: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    text_embeds: torch.Tensor | None,
    time_ids: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: StableDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """Make one update on captions that are encoded already; as `train_step`, whose text encoders must not be trained.

    Args:
        state, images, time_ids, example_ids: As of `train_step`.
        frozen: The VAE's parameters alone; {} where config.vae is None.
        encoder_hidden_states: [batch_size, num_tokens, cross_attention_dim], dtype of the state.
        text_embeds: [batch_size, pooled_size], dtype of the state; None for a UNet without added embeddings.
        config: Of the run.

    Returns: as `train_step`.

    Raises: as it, and
        ValueError: The config has text encoders to be trained, which embeddings would keep out of the loss.

    Source: as of it.
    """
    texts = encoder_hidden_states, text_embeds
    shapes = state_shapes(config), frozen_shapes(config, with_text_encoders=False)
    validation.stable_diffusion_step_on_embeddings(state, frozen, images, *texts, time_ids, example_ids, config, *shapes)
    latents_BCHW = encode_images(frozen, images, example_ids, int(state["step"]), config=config)
    return _step(state, (latents_BCHW, None, *texts, time_ids, example_ids), config)


def encode_images(
    frozen: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    example_ids: torch.Tensor,
    step: int,
    *,
    config: StableDiffusionConfig,
) -> torch.Tensor:
    """Return the latents of images, drawn in this step as `train_image_diffusion.latents` does, or images that are latents.

    Nothing is checked but by the VAE; there are no gradients.
    """
    if config.vae is None:
        return images
    with torch.no_grad():
        parameters = states.part(frozen, "vae")
        return train_image_diffusion.latents(parameters, images, example_ids, step, seed=config.seed, config=config.vae)


def encode_texts(
    frozen: Mapping[str, torch.Tensor], input_ids: torch.Tensor, *, config: StableDiffusionConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what a UNet is told of captions, by text encoders that are not trained.

    Args:
        frozen: Their parameters, among others.
        input_ids: [batch_size, num_encoders, num_tokens], int32 or int64.
        config: Of the run.

    Returns:
        encoder_hidden_states: [batch_size, num_tokens, cross_attention_dim], dtype of frozen; no gradients.
        text_embeds: [batch_size, pooled_size], like them; None for a UNet without added embeddings.

    Raises: as `clip_text.clip_text`.
    """
    with torch.no_grad():
        return tell_texts(clip_text.clip_text, frozen, input_ids, config=config)


def tell_texts(
    encode: Function, parameters: Mapping[str, torch.Tensor], input_ids: torch.Tensor, *, config: StableDiffusionConfig
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `encode_texts`, but differentiable, and by a function like `clip_text.clip_text`."""
    hidden_states, pooled_BV = [], None
    for index, (name, encoder) in enumerate(zip(config.text_encoder_names, config.text_encoders, strict=True)):
        hidden_BSD, pooled_BV = encode(states.part(parameters, name), input_ids[:, index], config=encoder)
        hidden_states.append(hidden_BSD)
    return torch.cat(hidden_states, dim=2), pooled_BV if config.is_told_sizes else None


def _step(state: Mapping[str, torch.Tensor], batch: tuple[Any, ...], config: StableDiffusionConfig) -> tuple[Tensors, Metrics]:
    """Make the update of a batch that is known to be good."""
    new_state, metrics = training.step(shares, state, batch, config=config)
    return new_state, Metrics(**metrics)


def shares(
    parameters: Tensors, latents: torch.Tensor, *others: Any, batch_size: int, step: int, config: StableDiffusionConfig
) -> tuple[torch.Tensor, Tensors]:
    """Return a microbatch's share of what is minimized and of the metrics, as `training.step` takes it.

    A batch is latents, input_ids, encoder_hidden_states, text_embeds, time_ids and example_ids; None for what there is none of.
    """
    model = partial(predict, clip_text.clip_text, denoiser(config), parameters, config=config)
    loss = example_losses(model, latents, *others, step=step, config=config).sum() / batch_size
    return loss, {"loss": loss}


def example_losses(
    model: Function,
    latents: torch.Tensor,
    input_ids: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    text_embeds: torch.Tensor | None,
    time_ids: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    step: int,
    config: StableDiffusionConfig,
) -> torch.Tensor:
    """Return the loss of each example, [batch_size], at what is drawn for it in this step.

    `model` takes the arrays of `predict`; the other arguments are as of `shares`.
    """
    noise_BCHW, added_BCHW, timesteps_B, is_dropped_B = draws(latents, example_ids, step, config=config)
    alphas_B, sigmas_B, weights_B = (each.to(latents.dtype) for each in rates(timesteps_B, config=config))
    noised_BCHW = training.in_compute_dtype(predictions.add_noise(latents, added_BCHW, alphas_B, sigmas_B), config)
    texts = (None if each is None else training.in_compute_dtype(each, config) for each in (encoder_hidden_states, text_embeds))

    prediction_BCHW = model(noised_BCHW, timesteps_B.to(latents.dtype), input_ids, *texts, time_ids, is_dropped_B)
    kind = config.schedule.prediction_type
    target_BCHW = predictions.prediction_target(latents, noise_BCHW, alphas_B, sigmas_B, prediction_type=kind)
    errors_BCHW = at_least_float32(prediction_BCHW) - target_BCHW
    return weights_B * errors_BCHW.square().flatten(1).mean(dim=1)


def predict(
    encode: Function,
    denoise: Function,
    parameters: Mapping[str, torch.Tensor],
    noised: torch.Tensor,
    timesteps: torch.Tensor,
    input_ids: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    text_embeds: torch.Tensor | None,
    time_ids: torch.Tensor,
    is_dropped: torch.Tensor,
    *,
    config: StableDiffusionConfig,
) -> torch.Tensor:
    """Return what the UNet predicts, told captions that are encoded here, or were before.

    Args:
        encode: A function like `clip_text.clip_text`.
        denoise: A function like that of `denoiser`.
        parameters: Of the UNet, and of the text encoders where input_ids are given.
        noised: [batch_size, in_channels, height, width], floating.
        timesteps: [batch_size], float32 or float64.
        input_ids: [batch_size, num_encoders, num_tokens]; None where encoder_hidden_states is given.
        encoder_hidden_states, text_embeds: As of `encode_texts`, dtype of noised.
        time_ids: [batch_size, num_time_ids], float32 or float64.
        is_dropped: [batch_size], bool: who is told 0 in place of a text.
        config: Of the run.

    Returns:
        Like noised.
    """
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
    latents: torch.Tensor, example_ids: torch.Tensor, step: int, *, config: StableDiffusionConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw what is random in a step, each example by its id.

    Args:
        latents: [batch_size, channels, height, width], of which only shape and dtype count.
        example_ids: [batch_size], integer.
        step: The updates made so far.
        config: Of the run.

    Returns:
        noise: Like latents: standard normal, and noise_offset times one more number for each channel.
        added: Like noise: it, and input_perturbation times another noise.
        timesteps: [batch_size], integer in 0..num_train_timesteps - 1.
        is_dropped: [batch_size], bool: whether the model is not told the text.
    """
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids}
    noise_BCHW = random.normal(latents.shape[1:], **key, purpose=purposes.TRAINING_NOISE).to(latents.dtype)
    offset_BC11 = random.normal((latents.shape[1], 1, 1), **key, purpose=purposes.NOISE_OFFSET).to(latents.dtype)
    noise_BCHW = noise_BCHW + config.noise_offset * offset_BC11
    more_BCHW = random.normal(latents.shape[1:], **key, purpose=purposes.INPUT_PERTURBATION).to(latents.dtype)
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


def rates(timesteps: torch.Tensor, *, config: StableDiffusionConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return how much there is of the data and of the noise at timesteps [B], and by how much examples count, [B] float64 each.

    Of float32 tables, 1 - alphas_cumprod would have lost four digits at the first timesteps.
    """
    alphas_cumprod_B = noise_schedules.alphas_cumprod(config.schedule).to(timesteps.device)[timesteps]
    alphas_B, sigmas_B = noise_schedules.signal_and_noise(alphas_cumprod_B)
    if config.snr_gamma is None:
        return alphas_B, sigmas_B, torch.ones_like(alphas_B)
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
    """Return the names of parameters in the state that no loss depends on, and which are therefore not trained.

    Where hidden states are taken from a layer before the last, as for XL, those after it serve the pooled result alone, of which
    only the last encoder's is told.
    """
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
