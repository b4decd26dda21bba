"""Models in JAX over the ranks of a mesh: how their parameters are brought there, as partition rules say."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax.mesh import REPLICATED, mesh_of_ranks
from gaugeblock.optimized.partition_rules import Rules

State = Mapping[str, jax.Array]
Outputs = TypeVar("Outputs")


def shard_state(state: State, rules: Rules, mesh: Mesh) -> dict[str, jax.Array]:
    """Place a state on the ranks as rules say; what is cut in blocks gets an axis for them: [3 * D, D] becomes [3, D, D]."""
    mesh, placed = mesh_of_ranks(mesh), {}
    for name, cut in partition_rules.cuts_of(state, rules).items():
        parameter, place = state[name], REPLICATED
        if cut is not None:
            axis = cut.axis
            if cut.blocks > 1:
                shape = parameter.shape
                parameter = parameter.reshape(*shape[:axis], cut.blocks, shape[axis] // cut.blocks, *shape[axis + 1 :])
                axis += 1
            place = PartitionSpec(*[None] * axis, "ranks")
        placed[name] = jax.device_put(parameter, NamedSharding(mesh, place))
    return placed


def run_on_ranks(
    of_placed: Callable[..., Outputs], rules: Rules, state: State, *arrays: jax.Array | None, config: Any, mesh: Mesh
) -> Outputs:
    """Check what is of the mesh, bring state and arrays to the ranks, and run the model there.

    Args:
        of_placed: The model, of a state as `shard_state` places it by these rules, of the arrays, config and mesh.

    Raises:
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide a size by which the rules cut.
    """
    mesh = mesh_of_ranks(mesh)
    partition_rules.require_divisible(config, rules, mesh.size)
    placed = jax.device_put(arrays, NamedSharding(mesh, REPLICATED))
    return of_placed(shard_state(state, rules, mesh), *placed, config=config, mesh=mesh)
