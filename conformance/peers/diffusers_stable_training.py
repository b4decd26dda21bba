"""The training loop of diffusers' examples of Stable Diffusion, one round of which is a training step.

Imported only where diffusers and transformers are installed.
"""

from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from gaugeblock.conformance.engine.vocabulary import Tensors
from gaugeblock.conformance.peers.diffusers_training import round_of_module, trained
from gaugeblock.conformance.peers.diffusers_unet import module_of
from gaugeblock.conformance.peers.diffusers_vae import DiffusersVaeEncode
from gaugeblock.conformance.peers.transformers_clip import TransformersClip
from gaugeblock.reference import states
from gaugeblock.reference.configs import StableDiffusionConfig
from gaugeblock.reference.torch import train_image_diffusion, train_stable_diffusion, training
from gaugeblock.reference.torch.train_stable_diffusion import Metrics


class DiffusersStableDiffusionLoop:
    """UNet2DConditionModel, recomputed by its own means, AutoencoderKL, CLIPTextModel, DDPMScheduler, and as the loop of SD 3.

    As in its examples train_text_to_image and train_text_to_image_sdxl, but that draws are by example and captions are dropped;
    of text encoders that are not trained.
    """

    def __call__(self, state, frozen, images, input_ids, time_ids, example_ids, *, config):
        module = trained(module_of(config.unet), training.part_of_state(state, "model.unet"), config)
        of_module = partial(losses, module, frozen, step=int(state["step"]), config=config)
        batch = images, input_ids, time_ids, example_ids
        new_state, loss, norm = round_of_module(module, "unet.", of_module, state, batch, config)
        return new_state, Metrics(loss, norm)


def losses(
    module: Any, frozen: Tensors, images: torch.Tensor, input_ids: torch.Tensor, time_ids: torch.Tensor, ids: torch.Tensor, *,
    step: int, config: StableDiffusionConfig,
) -> torch.Tensor:  # fmt: skip
    """Of each example, [B]: its squared error, weighted."""
    assert config.vae is not None
    with torch.no_grad():
        mean, logvar = DiffusersVaeEncode()(states.part(frozen, "vae"), images, config=config.vae)
        latents = train_image_diffusion.draw_latents(mean, logvar, ids, step, seed=config.seed, config=config.vae)
        encoded = [
            TransformersClip()(states.part(frozen, name), input_ids[:, index], config=encoder)
            for index, (name, encoder) in enumerate(zip(config.text_encoder_names, config.text_encoders, strict=True))
        ]
    noise, added, timesteps, is_dropped = train_stable_diffusion.draws(latents, ids, step, config=config)
    texts = torch.cat([hidden for hidden, _ in encoded], dim=2) * ~is_dropped[:, None, None]
    told = {}
    if config.is_told_sizes:
        told = {"added_cond_kwargs": {"text_embeds": encoded[-1][1] * ~is_dropped[:, None], "time_ids": time_ids}}

    scheduler = scheduler_of(config)
    kind = scheduler.config.prediction_type
    noised = scheduler.add_noise(latents, added, timesteps)
    predicted = module(noised, timesteps, texts, return_dict=False, **told)[0]
    target = scheduler.get_velocity(latents, noise, timesteps) if kind == "v_prediction" else noise
    errors = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)
    if config.snr_gamma is None:
        return errors
    snr = compute_snr(scheduler, timesteps)
    clipped = snr.clamp(max=config.snr_gamma)
    return errors * (clipped / (snr + 1) if kind == "v_prediction" else clipped / snr)


def scheduler_of(config: StableDiffusionConfig) -> Any:
    """Their scheduler of this schedule; noise and velocities alone are predicted in both examples."""
    assert config.schedule.prediction_type != "sample"
    names = "num_train_timesteps beta_start beta_end beta_schedule prediction_type rescale_betas_zero_snr".split()
    return DDPMScheduler(**{name: getattr(config.schedule, name) for name in names})
