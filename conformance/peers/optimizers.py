"""torch's optimizers in the middle of a run, as the training loops of public libraries have them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gaugeblock.reference.configs import TrainingConfig


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
