"""What the contracts of models have in common: their parameters as inputs, drawn, counted."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from gaugeblock.conformance.engine.contract import Input
from gaugeblock.conformance.engine.implementation import Implementation, compiled, distributed, jax, triton
from gaugeblock.conformance.engine.inputs.draw import Draw
from gaugeblock.conformance.engine.shardings import Sharding
from gaugeblock.conformance.engine.vocabulary import DEVICES, DType, Tensors

Shapes = Mapping[str, tuple[int, ...]]
# torch rounds what its products give, and on a CPU their bits depend on how many rows there are.
LIBRARY_PRODUCTS: dict[str, Any] = {"rounding": "eager", "batch_invariant": False}
ON_RANKS: dict[str, Any] = {
    "dtypes": ("float32", "bfloat16"),
    "world_sizes": (1, 2, 4),
    "devices": DEVICES,
    **LIBRARY_PRODUCTS,
}
SHARDINGS: dict[str, Sharding] = {
    "whole": {},  # inputs, results and gradients are on every rank alike
    "data_parallel": {"batch_size": "uneven"},
}


def on_one_device(module: str, operation: str = "") -> tuple[Implementation, ...]:
    """The rows of a model on one device; `operation` where it is not named as its module."""
    return (
        compiled("compiled", devices=("cuda",), **LIBRARY_PRODUCTS),  # on a CPU every compilation takes minutes
        compiled(
            "torch-library", f"{module}:{operation or module}_by_library", dtypes=("float32", "bfloat16"), **LIBRARY_PRODUCTS
        ),
        triton(**LIBRARY_PRODUCTS),
        jax("jax-compiled"),
    )


def jax_sharded(function: str, *, only: str) -> Implementation:
    """The row of a model over JAX devices: four, since each number takes a compilation; tests have the others."""
    return distributed("jax-sharded", function, framework="jax", world_sizes=(4,), only=only)


def fsdp2(function: str, *, dtypes: tuple[DType, ...] = ("float32",)) -> Implementation:
    """The row of a model whose ranks have a part of every parameter and of the batch.

    It computes in float32 whatever the dtype, and rounds once, by what all models share: DiT's row is judged in bfloat16, too.
    """
    claims = ON_RANKS | {"rounding": "strict", "dtypes": dtypes}
    return distributed("fsdp2", f"fully_sharded_models:{function}", sharding="data_parallel", **claims)


def leaves(shapes: Shapes) -> dict[str, Input]:
    """Parameters as inputs."""
    return {name: Input(name, shape) for name, shape in shapes.items()}


def drawn(draw: Draw, shapes: Shapes, *, tables: tuple[str, ...] = (), around_one: tuple[str, ...] = ()) -> Tensors:
    """Random parameters, none of them 0, under the keys that an argument `state` has.

    Args:
        shapes: Of each by name.
        tables: Parts of names of embeddings, of which rows are read; their deviation is a half.
        around_one: Parts of names of what scales (of norms); they are 1 and a bit. All other matrices and kernels are scaled by
            fan-in, all other vectors have a deviation of a half.
    """
    state = {}
    for name, shape in shapes.items():
        is_table = any(each in name for each in tables)
        fan_in = math.prod(shape[-1:] if len(shape) == 3 else shape[1:])  # of three axes, the first is of experts
        deviation = fan_in**-0.5 if len(shape) > 1 and not is_table else 0.5
        offset = 1.0 if any(each in name for each in around_one) else 0.0
        state[f"state/{name}"] = draw.normal(*shape) * deviation + offset
    return state


def times(draw: Draw, batch_size: int) -> torch.Tensor:
    """Of each example, up to 999; the second is 1 before the first, which is so late that bfloat16 takes both for one."""
    drawn = 999 * draw.uniform(batch_size)
    drawn[:1] = 600 + 0.4 * drawn[:1]
    drawn[1:2] = drawn[:1] - 1
    return drawn


def moved(shapes: Shapes, *, without: tuple[str, ...] = ()) -> float:
    """How many numbers are read of the parameters, but for tables of which few rows are."""
    return float(sum(math.prod(shape) for name, shape in shapes.items() if not any(each in name for each in without)))


def product_flops(shape: tuple[int, ...], rows: float) -> float:
    """Operations of a matrix product, or of a convolution, that has so many rows, or places in its result."""
    return 2.0 * rows * math.prod(shape) if len(shape) > 1 else 0.0


def full(tensors: Tensors, name: str, value: float) -> Tensors:
    """An input that has one value everywhere."""
    return {name: torch.full_like(tensors[name], value)}
