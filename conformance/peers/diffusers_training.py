"""The training loop of diffusers' examples, one round of which is a training step; imported only where diffusers is installed."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from gaugeblock.conformance.engine.vocabulary import Tensors
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.conformance.peers.optimizers import optimizer_of
from gaugeblock.reference.configs import ImageDiffusionConfig, MMDiTConfig
from gaugeblock.reference.torch import objectives, train_image_diffusion, training
from gaugeblock.reference.torch.train_image_diffusion import Metrics

State = Mapping[str, torch.Tensor]


class DiffusersTrainingLoop:
    """SD3Transformer2DModel, recomputed by its own means, torch.optim, clip_grad_norm_, get_scheduler, EMAModel.

    As in its example train_dreambooth_sd3, but that draws are by example; for uniform times and the velocity.
    """

    def __call__(self, state, images, encoder_hidden_states, pooled_projections, example_ids, *, config):
        step, batch = int(state["step"]), (images, encoder_hidden_states, pooled_projections, example_ids)
        module = made_of(training.part_of_state(state, "model"), config)
        parameters = dict(module.named_parameters())
        optimizer = optimizer_of(parameters, state, config, get_scheduler)
        loss = images.new_zeros(())
        for part in zip(*(each.tensor_split(min(config.accumulation_steps, len(images))) for each in batch), strict=True):
            share = losses(module, *part, step=step, config=config).sum() / len(images)
            share.backward()
            loss += share.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_gradient_norm)
        optimizer.step()

        parts: dict[str, Any] = {"model": {name: each.detach() for name, each in module.state_dict().items()}}
        for moment in config.moments:
            parts[moment] = {name: optimizer.state[each][moment] for name, each in parameters.items()}
        if config.ema is not None:
            parts["ema"] = averages_of(training.part_of_state(state, "ema"), parts["model"], step, config)
        return training.join_state(parts, state["step"] + 1), Metrics(loss, torch.zeros_like(loss), norm)


def made_of(parameters: Tensors, config: ImageDiffusionConfig) -> Any:
    """The model with these parameters, and the table of positions as a buffer."""
    assert isinstance(config.model, MMDiTConfig)
    module = with_buffers_alone(SD3Transformer2DModel, **asdict(config.model)).train()
    own = {name: each.clone() for name, each in parameters.items()}
    module.load_state_dict(own, strict=True, assign=True)
    module.requires_grad_(True)
    if config.activation_checkpointing:
        module.enable_gradient_checkpointing()
    return module


def losses(
    module: Any, images: torch.Tensor, texts: torch.Tensor, pooled: torch.Tensor, ids: torch.Tensor, *,
    step: int, config: ImageDiffusionConfig,
) -> torch.Tensor:  # fmt: skip
    """Of each example, [B]: its squared error of the velocity."""
    noise, times, is_dropped = train_image_diffusion.draws(images, ids, step, config=config)
    texts, pooled = texts * ~is_dropped[:, None, None], pooled * ~is_dropped[:, None]
    noised = (1.0 - times[:, None, None, None]) * images + times[:, None, None, None] * noise
    predicted = module(noised, texts, pooled, objectives.TIMESTEPS * times, return_dict=False)[0]
    target = noise - images if config.velocity == "noise - data" else images - noise
    return ((predicted - target) ** 2).reshape(len(images), -1).mean(1)


def averages_of(averages: Tensors, parameters: Tensors, step: int, config: ImageDiffusionConfig) -> Tensors:
    """EMAModel's, after this update; of what is not trained they stay."""
    assert config.ema is not None
    ema, options = config.ema, asdict(config.ema)
    model = EMAModel([], use_ema_warmup=options.pop("warmup"), **options)
    assert ema.decay == model.decay
    model.optimization_step = step
    model.shadow_params = [each.clone() for each in averages.values()]
    model.step([torch.nn.Parameter(parameters[name]) for name in averages])
    return dict(zip(averages, model.shadow_params, strict=True))
