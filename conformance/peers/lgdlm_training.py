"""LGDLM's training loop on mmdit's model, one round of which is a training step; imported only where mmdit is installed.

The project is on no package index: its trainer is written out here, of torch's losses and optimizer, as it means its latents,
[batch_size, latent_dim].
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

from gaugeblock.conformance.engine.vocabulary import Tensors
from gaugeblock.conformance.peers.lucidrains import TextLatentModel
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.reference.configs import CycleVAEConfig
from gaugeblock.reference.torch import train_cycle_vae, training
from gaugeblock.reference.torch.train_cycle_vae import PARTS, Metrics

State = Mapping[str, torch.Tensor]
WEIGHTED = "base_t2l_latent_loss", "base_l2t_text_loss", "cycle_text_loss", "cycle_latent_loss"


class LgdlmTrainingLoop:
    """Four passes of the model, normalize, mse_loss, cross_entropy, torch.optim.AdamW, clip_grad_norm_; no average."""

    def __call__(self, state, input_ids, latents, attention_mask, example_ids, *, config):
        step, batch = int(state["step"]), (input_ids, latents, attention_mask, example_ids)
        module = with_buffers_alone(TextLatentModel, config.model).eval()
        own = {name: each.clone() for name, each in training.part_of_state(state, "model").items()}
        module.load_state_dict(own, strict=True, assign=True)
        module.requires_grad_(True)
        trained = {name: each for name, each in module.named_parameters() if f"exp_avg.{name}" in state}
        optimizer = optimizer_of(trained, state, config)

        reported = {name: latents.new_zeros(()) for name in (*PARTS, "loss")}
        for part in zip(*(each.tensor_split(min(config.accumulation_steps, len(latents))) for each in batch), strict=True):
            loss, parts = loss_and_parts(module, part, step, config)
            share = len(part[0]) / len(latents)
            (share * loss).backward()
            reported |= {name: reported[name] + share * each.detach() for name, each in parts.items()}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), config.max_gradient_norm)
        optimizer.step()

        new: dict[str, Any] = {"model": {name: each.detach() for name, each in module.state_dict().items()}}
        for moment in config.moments:
            new[moment] = {name: optimizer.state[each][moment] for name, each in trained.items()}
        weights = train_cycle_vae.weight_metrics(state["step"], latents, config=config)
        return training.join_state(new, state["step"] + 1), Metrics(**reported, **weights, gradient_norm=norm)


def optimizer_of(trained: Mapping[str, torch.nn.Parameter], state: State, config: CycleVAEConfig) -> torch.optim.Optimizer:
    """Torch's, in the middle of the run, at the learning rate of its step; what the loss does not reach has gradients of 0."""
    assert config.optimizer == "adamw" and config.ema is None
    optimizer = torch.optim.AdamW(
        trained.values(), lr=training.learning_rate_of(int(state["step"]), config), betas=(config.beta1, config.beta2),
        eps=config.adam_epsilon, weight_decay=config.weight_decay,
    )  # fmt: skip
    for name, parameter in trained.items():
        parameter.grad = torch.zeros_like(parameter)
        moments = {moment: state[f"{moment}.{name}"].clone() for moment in config.moments}
        optimizer.state[parameter] = {"step": state["step"].to(torch.float32), **moments}
    return optimizer


def loss_and_parts(
    model: Callable[..., Any], batch: tuple[torch.Tensor, ...], step: int, config: CycleVAEConfig
) -> tuple[torch.Tensor, Tensors]:
    """The loss of a microbatch, and what is reported of it."""
    ids, latents, mask, example_ids = batch
    zeros, ones = latents.new_zeros(len(ids)), latents.new_ones(len(ids))
    text_weight, latent_weight = train_cycle_vae.cycle_weights(step, config=config)
    parts = {"latent_norm": latents.norm(dim=-1).mean()}

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).clamp(0, 100)

    def noised(is_cycle: bool) -> tuple[torch.Tensor, ...]:
        drawn = train_cycle_vae.draws(latents, example_ids, step, is_cycle=is_cycle, config=config)
        noise, times, alphas, sigmas = drawn[0], drawn[1], drawn[2][:, None], drawn[3][:, None]
        kinds = {"epsilon": noise, "sample": latents, "v_prediction": alphas * noise - sigmas * latents}
        return alphas * latents + sigmas * noise, times, alphas, sigmas, kinds[config.prediction_type]

    masked = torch.full_like(ids, config.mask_token_id)
    if config.mode != "l2t":
        x, times, alphas, sigmas, target = noised(False)
        predicted = model(ids, x, zeros, times, mask)[1].squeeze(1)
        of_noise, of_velocity = (x - sigmas * predicted) / alphas, alphas * x - sigmas * predicted
        sample = {"epsilon": of_noise, "sample": predicted, "v_prediction": of_velocity}[config.prediction_type]
        parts |= {"base_t2l_latent_loss": distance(predicted, target), "t_lat_mean": times.mean()}
        parts |= {"latent_pred_norm": predicted.norm(dim=-1).mean(), "x0_pred_norm": sample.norm(dim=-1).mean()}
    if config.mode != "t2l":
        logits = model(masked, latents, ones, zeros, mask)[0]
        parts["base_l2t_text_loss"] = entropy(logits)
    if text_weight > 0:
        known = sample.detach() if config.cycle_stop_grad_latent else sample
        parts["cycle_text_loss"] = entropy(model(masked, known, ones, zeros, mask)[0])
    if latent_weight > 0:
        tokens = logits.argmax(-1)
        if config.cycle_latent_sampling == "categorical":
            tokens = train_cycle_vae.pseudo_tokens(logits, example_ids, step, config=config)
        x, times, _, _, target = noised(True)
        parts["cycle_latent_loss"] = distance(model(tokens, x, zeros, times, mask)[1].squeeze(1), target)
    weights = config.latent_loss_weight, 1.0, text_weight, latent_weight
    loss = sum(weight * parts[name] for name, weight in zip(WEIGHTED, weights, strict=True) if name in parts)
    return loss, parts | {"loss": loss}


def distance(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of directions of latents."""
    one, other = (functional.normalize(each, p=2.0, dim=-1, eps=1e-8) for each in (predicted, target))
    return functional.mse_loss(one, other)
