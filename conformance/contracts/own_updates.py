"""Training steps whose optimizer writes to tensors that each run of a budget has of its own.

torch.optim writes to copies of the state. Runs under rounding noise that are made at once share these, since no noise has met
them, and would have to be made one by one, which takes three times as long.
"""

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch

from gaugeblock.reference.configs import TrainingConfig
from gaugeblock.reference.torch import training
from gaugeblock.reference.torch.training import Tensors


def of(step: Callable[..., Any]) -> Callable[..., Any]:
    """A training step, with the same results and the same rounding."""

    def formula(*arguments: Any, **options: Any) -> Any:
        with mock.patch.object(training, "optimizer_step", optimizer_step):
            return step(*arguments, **options)

    return formula


def optimizer_step(parts: Mapping[str, Tensors], gradients: Tensors, step: int, *, config: TrainingConfig) -> dict[str, Tensors]:
    """As `training.optimizer_step`, of values that were chosen between the state's, always, and the gradients."""
    own = {part: dict(tensors) for part, tensors in parts.items()}
    for part in ("model", *config.moments):
        for name, gradient in gradients.items():
            own[part][name] = torch.where(torch.ones_like(gradient, dtype=torch.bool), own[part][name], gradient)
    return _optimizer_step(own, gradients, step, config=config)


_optimizer_step = training.optimizer_step
