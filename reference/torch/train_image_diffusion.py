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

import torch

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import ImageDiffusionConfig, VAEConfig
from gaugeblock.reference.torch import image_models, objectives, random, timestep_sampling, training, vae
from gaugeblock.reference.torch.precision import at_least_float32

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Metrics:
    """What a step reports, before the update.

    Attributes:
        loss: [], the mean over the examples of the batch.
        auxiliary_loss: [], what is differentiated beside it: of a mixture of experts, the load balance of each microbatch,
            averaged by their numbers of examples; 0 for other models.
        gradient_norm: [], the norm of all gradients together, before clipping.
    """

    loss: torch.Tensor
    auxiliary_loss: torch.Tensor
    gradient_norm: torch.Tensor


def initial_state(config: ImageDiffusionConfig) -> Tensors:
    """Return the state at the start of a run: a new model, moments of zero, step 0; float32, and an int64 step."""
    parameters = image_models.initial_state(config.model, seed=config.seed)
    return training.initial_state(parameters, config=config, frozen=image_models.frozen_names(config.model))


def train_step(
    state: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    labels: torch.Tensor,
    example_ids: torch.Tensor,
    *,
    config: ImageDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """Make one update of a model that is told classes on the mean loss of a batch; the given state is not written to.

        t, noise, dropped  = draws of each example
        x                  = (1 - t) * image + t * noise
        error              = model(x, 1000 t, num_classes where dropped, else the label) - target
        loss               = mean over b of weight(t[b]) * mean of error[b]**2
        new_state          = update of the optimizer by the clipped gradients of loss + auxiliary_loss (`training.update`)

    Args:
        state: As of `training`; float32 or float64, with an integer step.
        images: [batch_size, in_channels, input_size, input_size], dtype of the state: pixels, or latents (`latents`).
        labels: [batch_size], integer in 0..num_classes - 1.
        example_ids: [batch_size], integer in 0..2**32 - 1; examples with the same id get the same draws.
        config: Of the run; its model is a DiT or a DiT-MoE.

    Returns:
        new_state: As state.
        metrics: In the dtype of the state.

    Raises:
        TypeError: An argument is not an array of the dtype above, or `state` is not a dict of arrays.
        ValueError: Shapes or devices do not fit together, `state` lacks an entry or has one too many, or the model is told texts.
        FloatingPointError: A loss or a gradient is not finite; the message names the step and the first bad one.

    Source: Esser et al. (arXiv:2403.03206), section 2; label dropout: Ho and Salimans (arXiv:2207.12598), algorithm 1; other
    predictions and their weights: Hang et al. (arXiv:2303.09556), section 3.4; EasyDeL, image_diffusion_trainer.
    """
    validation.image_diffusion_step(state, images, labels, example_ids, config, image_models.state_shapes(config.model))
    return _step(state, (images, labels, None, None, example_ids), config)


def train_step_on_texts(
    state: Mapping[str, torch.Tensor],
    images: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor | None,
    example_ids: torch.Tensor,
    *,
    config: ImageDiffusionConfig,
) -> tuple[Tensors, Metrics]:
    """Make one update of a model that is told texts; as `train_step`, but what is dropped is told 0.

    Args:
        state, example_ids: As of `train_step`.
        images: [batch_size, in_channels, height, width], dtype of the state: pixels, or latents (`latents`).
        encoder_hidden_states: [batch_size, text_length, width], dtype of the state.
        pooled_projections: [batch_size, width], dtype of the state; None for a UNet, which is told no pooled text.
        config: Of the run; its model is a UNet, a Flux or an MMDiT.

    Returns: as `train_step`.

    Raises: as it.

    Source: as of it; Rombach et al. (arXiv:2112.10752), section 3.3.
    """
    texts = encoder_hidden_states, pooled_projections
    shapes, frozen = image_models.state_shapes(config.model), image_models.frozen_names(config.model)
    validation.image_diffusion_step_on_texts(state, images, *texts, example_ids, config, shapes, frozen)
    return _step(state, (images, None, *texts, example_ids), config)


def latents(
    state: Mapping[str, torch.Tensor], images: torch.Tensor, example_ids: torch.Tensor, step: int, *, seed: int, config: VAEConfig
) -> torch.Tensor:
    """Return what a latent diffusion model is trained on: a draw from the encoder's distribution, shifted and scaled.

        latents = (mean + exp(logvar / 2) * noise - shift_factor) * scaling_factor

    Args:
        state: The VAE's, or its encoder's parameters.
        images: [batch_size, in_channels, height, width], dtype of the state.
        example_ids: [batch_size], integer in 0..2**32 - 1; an id gets the same noise in any batch.
        step: By which the noise is drawn: the updates made so far, or 0 for latents that are made once.
        seed: Of the run.
        config: The VAE.

    Returns:
        [batch_size, latent_channels, ...], dtype as images.

    Raises: as `vae.encode` and `random.normal`.

    Source: Rombach et al. (arXiv:2112.10752), section 4.3.2; diffusers' train_text_to_image.py.
    """
    mean_BCHW, logvar_BCHW = vae.encode(state, images, config=config)
    return draw_latents(mean_BCHW, logvar_BCHW, example_ids, step, seed=seed, config=config)


def draw_latents(
    mean: torch.Tensor, logvar: torch.Tensor, example_ids: torch.Tensor, step: int, *, seed: int, config: VAEConfig
) -> torch.Tensor:
    """As `latents`, of what `vae.encode` returned."""
    key: dict[str, Any] = {"seed": seed, "step": step, "example": example_ids, "purpose": purposes.LATENT_NOISE}
    noise_BCHW = random.normal(mean.shape[1:], **key).to(mean.dtype)
    return vae.scale_latents(vae.sample(mean, logvar, noise_BCHW), config=config)


def _step(state: Mapping[str, torch.Tensor], batch: tuple[Any, ...], config: ImageDiffusionConfig) -> tuple[Tensors, Metrics]:
    """Make the update of a batch that is known to be good."""
    new_state, metrics = training.step(shares, state, batch, config=config)
    return new_state, Metrics(**metrics)


def shares(
    parameters: Tensors, images: torch.Tensor, *others: Any, batch_size: int, step: int, config: ImageDiffusionConfig
) -> tuple[torch.Tensor, Tensors]:
    """Return a microbatch's share of what is minimized and of the metrics, as `training.step` takes it.

    A batch is images, labels, encoder_hidden_states, pooled_projections and example_ids, as of the steps, None for what a model
    is not told.
    """
    model = partial(image_models.operation(config.model), parameters, config=config.model)
    losses_B, auxiliary_loss = example_losses(model, images, *others, step=step, config=config)
    loss, auxiliary_loss = losses_B.sum() / batch_size, auxiliary_loss * len(images) / batch_size
    return loss + auxiliary_loss, {"loss": loss, "auxiliary_loss": auxiliary_loss}


def example_losses(
    model: Callable[..., Any],
    images: torch.Tensor,
    labels: torch.Tensor | None,
    encoder_hidden_states: torch.Tensor | None,
    pooled_projections: torch.Tensor | None,
    example_ids: torch.Tensor,
    *,
    step: int,
    config: ImageDiffusionConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each example, [batch_size], at what is drawn for it in this step, and the model's auxiliary loss, [].

    `model` takes arrays, as of `image_models.predict`; the other arguments are as of the steps.
    """
    noise_BCHW, times_B, is_dropped_B = draws(images, example_ids, step, config=config)
    labels, *texts = image_models.drop(labels, encoder_hidden_states, pooled_projections, is_dropped_B, config=config.model)
    texts = [None if each is None else training.in_compute_dtype(each, config) for each in texts]

    noised_BCHW = training.in_compute_dtype(objectives.rectified_flow_interpolate(images, noise_BCHW, times_B), config)
    timesteps_B = objectives.TIMESTEPS * times_B
    prediction_BCHW, auxiliary_loss = image_models.predict(model, noised_BCHW, timesteps_B, labels, *texts, config=config.model)
    errors_BCHW = at_least_float32(prediction_BCHW) - target(images, noise_BCHW, config=config)
    return weights(times_B, config=config) * errors_BCHW.square().flatten(1).mean(dim=1), auxiliary_loss.to(images.dtype)


def target(images: torch.Tensor, noise: torch.Tensor, *, config: ImageDiffusionConfig) -> torch.Tensor:
    """Return what is to be predicted, like images."""
    match config.prediction_type:
        case "flow_prediction":
            return objectives.rectified_flow_velocity(images, noise, velocity=config.velocity)
        case "epsilon":
            return noise
        case "sample":
            return images
    raise AssertionError(config.prediction_type)  # which the config rules out


def weights(times: torch.Tensor, *, config: ImageDiffusionConfig) -> torch.Tensor:
    """Return by how much the examples at these times count, [batch_size]."""
    if config.min_snr_gamma is None:
        return torch.ones_like(times)
    return objectives.rectified_flow_min_snr_weights(
        times, prediction_type=config.prediction_type, gamma=config.min_snr_gamma, snr=config.snr
    )


def draws(
    images: torch.Tensor, example_ids: torch.Tensor, step: int, *, config: ImageDiffusionConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw what is random in a step, each example by its id.

    Args:
        images: [batch_size, channels, height, width], of which only shape and dtype count.
        example_ids: [batch_size], integer.
        step: The updates made so far.
        config: Of the run.

    Returns:
        noise: Like images, standard normal.
        times: [batch_size], dtype of images, in [0, 1].
        is_dropped: [batch_size], bool: whether the model is not told the class or the text.
    """
    key: dict[str, Any] = {"seed": config.seed, "step": step, "example": example_ids}
    noise_BCHW = random.normal(images.shape[1:], **key, purpose=purposes.TRAINING_NOISE)
    draw_time = random.normal if config.timestep_sampling == "logit-normal" else random.uniform
    times_B = draw_time((), **key, purpose=purposes.TRAINING_TIMES).to(images.dtype)
    is_dropped_B = random.uniform((), **key, purpose=purposes.LABEL_DROPOUT) < config.label_dropout
    return noise_BCHW.to(images.dtype), _sampled(times_B, config), is_dropped_B


def _sampled(drawn: torch.Tensor, config: ImageDiffusionConfig) -> torch.Tensor:
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
            return places_B.to(drawn.dtype) / objectives.TIMESTEPS
