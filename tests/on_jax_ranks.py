"""Models in JAX over the ranks of a mesh, compared with the PyTorch references, and what XLA lets them exchange."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import torch
from agreement import assert_agree
from test_jax_sharded_dit import exchanges, mesh_of, to_jax
from test_references import random

from gaugeblock.optimized.jax.sharded_models import shard_state
from gaugeblock.optimized.partition_rules import Rules

State = dict[str, torch.Tensor]


def assert_is_reference(
    reference: Callable, sharded: Callable, state: State, arrays: list[Any], *, config: Any, ranks: tuple[int, ...] = (1, 4)
) -> None:
    """Compare results and the gradients of all floating arrays but times, and of all parameters, in float64.

    Args:
        reference: Called with a state, the arrays, and config.
        sharded: The same of JAX, called with a mesh, too.
        state: Parameters in float64.
        arrays: Such as have gradients are in float64, others not.
        config: Of both.
        ranks: Sizes of the meshes.
    """
    is_leaf = [each is not None and each.dtype == torch.float64 for each in arrays]
    places = [place for place, each in enumerate(is_leaf) if each]
    leaves = [each.clone().requires_grad_() for each in (*(arrays[place] for place in places), *state.values())]
    names = [*(f"argument {place}" for place in places), *state]

    def call(function: Callable, others: list[Any], *leaves: Any, **options: Any) -> list[Any]:
        inputs = [*others]
        for place, leaf in zip(places, leaves, strict=False):
            inputs[place] = leaf
        out = function(dict(zip(state, leaves[len(places) :], strict=True)), *inputs, config=config, **options)
        return list(out) if isinstance(out, tuple) else [out]

    expected = call(reference, arrays, *leaves)
    cotangents = [random(*each.shape, seed=99 - place) for place, each in enumerate(expected)]
    used = torch.autograd.grad(expected, leaves, cotangents, materialize_grads=True)
    expected_of = dict(zip(names, used, strict=True)) | {f"out {place}": each.detach() for place, each in enumerate(expected)}
    with jax.enable_x64(True):
        others = [None if each is None else to_jax(each) for each in arrays]
        for num_ranks in ranks:
            on_ranks = partial(call, sharded, others, mesh=mesh_of(num_ranks))
            actual, pull_back = jax.vjp(on_ranks, *to_jax([each.detach() for each in leaves]))
            actual_of = dict(zip(names, pull_back(to_jax(cotangents)), strict=True))
            actual_of |= {f"out {place}": each for place, each in enumerate(actual)}
            assert_agree(actual_of, expected_of, f"over {num_ranks} ranks")


def exchanges_of(of_placed: Callable, rules: Rules, state: State, arrays: list[Any], *, config: Any) -> Counter[str]:
    """How many of each exchange XLA has made of a model over four ranks, in float32."""
    placed = shard_state(to_jax({name: each.float() for name, each in state.items()}), rules, mesh_of(4))
    inputs = [None if each is None else to_jax(each.float() if each.is_floating_point() else each) for each in arrays]
    return exchanges(lambda placed: of_placed(placed, *inputs, config=config, mesh=mesh_of(4)), placed)


def parts_of(state: State, rules: Rules, *, rank: int) -> dict[str, tuple[int, ...]]:
    """The shape of what one of four ranks holds of each parameter."""
    placed = shard_state(to_jax(state), rules, mesh_of(4))
    return {name: each.addressable_shards[rank].data.shape for name, each in placed.items()}
