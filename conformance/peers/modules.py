"""How modules of libraries are called as contracts say: without parameters of their own, without projections, sorted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


def without_parameters(module_class: Callable[..., torch.nn.Module], *arguments: Any) -> Any:
    """A module as at inference, of no memory: what parameters it needs are handed in, and no random numbers are drawn."""
    with torch.device("meta"):
        return module_class(*arguments).eval()


def with_buffers_alone(module_class: Callable[..., torch.nn.Module], *arguments: Any, **options: Any) -> Any:
    """The same of a module whose buffers (tables of places) are its own, and real."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else torch.nn.Parameter(parameter.detach().to("meta")))

    with patch.object(torch.nn.Module, "register_parameter", on_meta):
        return module_class(*arguments, **options).eval()


@contextmanager
def without_projection() -> Iterator[None]:
    """Their routers begin with a product that is no part of our contracts: here it hands on what it is given, in the dtype that
    autocast gives it."""

    def handed_on(states: torch.Tensor, *_: torch.Tensor | None) -> torch.Tensor:
        device = states.device.type
        return states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states

    with patch.object(torch.nn.functional, "linear", handed_on):
        yield


def sorted_by(scores: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice in descending order of the scores that it was made by."""
    order = scores.detach().gather(1, ids).argsort(1, descending=True)
    return weights.gather(1, order), ids.gather(1, order)
