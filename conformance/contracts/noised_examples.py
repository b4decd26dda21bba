"""What the contracts of predictions and of samplers' steps share: examples of any size, and how much noise is in each."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Input, Rejection, Workload
from gaugeblock.conformance.engine.factors import Factor, Trait, edges, either, kind_of_width, kinds
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.vocabulary import Parameters, Tensors

SHAPE = ("batch_size", "channels", "size")
FACTORS = (edges("batch_size", 1, 2, 3), edges("channels", 1, 2, 4), kinds("size", kind_of_width, 1, 15, 16, 24, 65))
FLOAT32 = ("alphas", "sigmas", "next_sigmas", "alphas_cumprod", "previous_alphas_cumprod")


def arrays(*names: str) -> tuple[Input, ...]:
    """Examples with gradients, and numbers of each in float32."""
    return tuple(
        Input(name, ("batch_size",), dtype="float32") if name in FLOAT32 else Input(name, SHAPE, differentiable=True)
        for name in names
    )


def builder(**options: Any) -> Callable[..., dict[str, Any]]:
    """Makes points of the input space, with these options by default."""

    def sizes(batch_size: int, channels: int, size: int, **others: Any) -> dict[str, Any]:
        return {"batch_size": batch_size, "channels": channels, "size": size} | options | others

    return sizes


def options_of(**values: tuple[Any, ...]) -> tuple[Factor, ...]:
    """Factors of sizes, and of options with these values."""
    return (*FACTORS, *(either(name, *each) for name, each in values.items()))


def elements(parameters: Parameters) -> float:
    """Of the examples."""
    return float(math.prod(parameters[name] for name in SHAPE))


def examples(draw: Draw, parameters: Parameters, *names: str) -> Tensors:
    """Standard normal ones."""
    return {name: draw.normal(*(parameters[each] for each in SHAPE)) for name in names}


def with_bad_ones(tensors: Tensors, name: str) -> Tensors:
    """One example of NaN, one with an infinity."""
    tensors[name][tensors[name].shape[0] // 2] = torch.nan
    tensors[name][-1, 0, 0] = torch.inf
    return tensors


def all_equal(factor: str, **values: float) -> Trait:
    """Numbers of the examples are these."""
    return Trait(
        ", ".join(f"{name} of {value:g}" for name, value in values.items()),
        factor,
        lambda tensors: {name: torch.full_like(tensors[name], value) for name, value in values.items()},
    )


def by_value(name: str, argument: str, change: Mapping[str, float]) -> Rejection:
    """A call with numbers of its examples that are out of their range."""
    return Rejection(
        name, argument, lambda call: {key: torch.full_like(call[key], value) for key, value in change.items()}, by_values=True
    )


def without_axes(argument: str) -> Rejection:
    """A call with examples that are single numbers."""
    return Rejection(
        "examples without an axis",
        argument,
        lambda call: {name: each[:, 0, 0] for name, each in call.items() if getattr(each, "ndim", 0) == len(SHAPE)},
    )


def workloads(sizes: Callable[..., dict[str, Any]], **options: Any) -> tuple[Workload, ...]:
    """Latents of published models."""
    return (
        Workload("dit-xl-2/latents-256", sizes(256, 4, 32 * 32, **options), "Peebles and Xie 2022 (arXiv:2212.09748) section 4"),
        Workload(
            "sdxl/latents-1024", sizes(16, 4, 128 * 128, **options), "stabilityai/stable-diffusion-xl-base-1.0 unet/config.json"
        ),
        Workload("two-cores/latents-8", sizes(8, 4, 32 * 32, **options), "a size for a CPU"),
    )
