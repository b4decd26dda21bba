"""The training loop of diffusers' examples, one round of which is a training step; imported only where diffusers is installed."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from gaugeblock.conformance.engine.vocabulary import Tensors
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.conformance.peers.training_loops import round_of_loop
from gaugeblock.reference.configs import ImageDiffusionConfig, MMDiTConfig, TrainingConfig
from gaugeblock.reference.torch import objectives, train_image_diffusion, training
from gaugeblock.reference.torch.train_image_diffusion import Metrics

State = Mapping[str, torch.Tensor]


class DiffusersTrainingLoop:
    """SD3Transformer2DModel, recomputed by its own means, torch.optim, clip_grad_norm_, get_scheduler, EMAModel.

    As in its example train_dreambooth_sd3, but that draws are by example; for uniform times and the velocity.
    """

    def __call__(self, state, images, encoder_hidden_states, pooled_projections, example_ids, *, config):
        module = made_of(training.part_of_state(state, "model"), config)
        of_module = partial(losses, module, step=int(state["step"]), config=config)
        batch = images, encoder_hidden_states, pooled_projections, example_ids
        new_state, loss, norm = round_of_module(module, "", of_module, state, batch, config)
        return new_state, Metrics(loss, torch.zeros_like(loss), norm)


def round_of_module(
    module: Any, prefix: str, losses: Callable[..., torch.Tensor], state: State, batch: tuple[Any, ...], config: TrainingConfig
) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
    """One round of the loop: the state after it, the loss, and the norm of the gradients.

    Args:
        module: With the parameters of the state, which are named as there after `prefix`.
        losses: Function of a microbatch, of each example.
        batch: Arrays whose first axis is of the examples.
    """
    parameters = {f"{prefix}{name}": each for name, each in module.named_parameters()}

    def shares(*part: Any) -> torch.Tensor:
        return losses(*part).sum() / len(batch[0])

    parts, loss, norm = round_of_loop(parameters, shares, state, batch, config, get_scheduler)
    parts["model"] = {f"{prefix}{name}": each.detach() for name, each in module.state_dict().items()}
    if config.ema is not None:
        parts["ema"] = averages_of(training.part_of_state(state, "ema"), parts["model"], int(state["step"]), config)
    return training.join_state(parts, state["step"] + 1), loss, norm


def made_of(parameters: Tensors, config: ImageDiffusionConfig) -> Any:
    """The model with these parameters, and the table of positions as a buffer."""
    assert isinstance(config.model, MMDiTConfig)
    return trained(with_buffers_alone(SD3Transformer2DModel, **asdict(config.model)), parameters, config)


def trained(module: Any, parameters: Tensors, config: TrainingConfig) -> Any:
    """A module of diffusers with a copy of these parameters, as it is trained."""
    module.load_state_dict({name: each.clone() for name, each in parameters.items()}, strict=True, assign=True)
    module.train().requires_grad_(True)
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


def averages_of(averages: Tensors, parameters: Tensors, step: int, config: TrainingConfig) -> Tensors:
    """EMAModel's, after this update; of what is not trained they stay."""
    assert config.ema is not None
    ema, options = config.ema, asdict(config.ema)
    model = EMAModel([], use_ema_warmup=options.pop("warmup"), **options)
    assert ema.decay == model.decay
    model.optimization_step = step
    model.shadow_params = [each.clone() for each in averages.values()]
    model.step([torch.nn.Parameter(parameters[name]) for name in averages])
    return dict(zip(averages, model.shadow_params, strict=True))
