"""What training loops of public libraries have in common: torch's optimizer in the middle of a run, and a round of the loop."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gaugeblock.reference.configs import TrainingConfig

Parts = dict[str, dict[str, torch.Tensor]]


def round_of_loop(
    parameters: Mapping[str, torch.nn.Parameter],
    shares: Callable[..., torch.Tensor],
    state: Mapping[str, torch.Tensor],
    batch: tuple[Any, ...],
    config: TrainingConfig,
    get_scheduler: Callable[..., Any],
) -> tuple[Parts, torch.Tensor, torch.Tensor]:
    """One round: what the state then has of its trained parameters, the loss, and the norm of the gradients.

    Args:
        parameters: By their names in the state; they are updated in place.
        shares: Function of a microbatch: its share of the loss of the batch.
        state: Of a run.
        batch: Arrays whose first axis is of the examples.
        config: Of the run.
        get_scheduler: The library's.
    """
    optimizer = optimizer_of(parameters, state, config, get_scheduler)
    loss = next(iter(parameters.values())).new_zeros(())
    for part in zip(*(each.tensor_split(min(config.accumulation_steps, len(each))) for each in batch), strict=True):
        share = shares(*part)
        share.backward()
        loss += share.detach()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_gradient_norm)
    optimizer.step()
    parts: Parts = {"model": {name: each.detach() for name, each in parameters.items()}}
    for moment in config.moments:
        parts[moment] = {name: optimizer.state[each][moment] for name, each in parameters.items()}
    return parts, loss, norm


def optimizer_of(
    parameters: Mapping[str, torch.nn.Parameter],
    state: Mapping[str, torch.Tensor],
    config: TrainingConfig,
    get_scheduler: Callable[..., Any],
) -> Any:
    """Torch's, at the learning rate of its step by a library's `get_scheduler`; what nothing uses has gradients of 0."""
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    adam: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.adam_epsilon} | common
    optimizer: Any = {
        "adamw": lambda: torch.optim.AdamW(parameters.values(), **adam),
        "adam": lambda: torch.optim.Adam(parameters.values(), **adam),
        "sgd": lambda: torch.optim.SGD(parameters.values(), momentum=config.momentum, **common),
    }[config.optimizer]()
    for name, parameter in parameters.items():
        parameter.grad = torch.zeros_like(parameter)
        moments = {moment: state[f"{moment}.{name}"].clone() for moment in config.moments}
        optimizer.state[parameter] = {"step": state["step"].to(torch.float32), **moments}
    schedule = config.learning_rate_schedule
    of_library = get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule, optimizer,
        num_warmup_steps=config.num_warmup_steps, num_training_steps=config.num_training_steps,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * of_library.lr_lambdas[0](int(state["step"]))
    return optimizer
