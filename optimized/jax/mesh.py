"""The mesh that the sharded versions run on."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

from gaugeblock.optimized.parallel_layout import ParallelLayout

OVER_RANKS = PartitionSpec("ranks")
REPLICATED = PartitionSpec()


def mesh_of_layout(layout: ParallelLayout, devices: Sequence[jax.Device]) -> Mesh:
    """Return the mesh of a layout, whose ranks are the devices in their order; experts lie over its `layout.expert_axes`.

    Raises:
        ValueError: There are not as many devices as the layout takes.
    """
    if len(devices) != layout.world_size:
        raise ValueError(f"layout takes {layout.world_size} devices, got {len(devices)}: {layout}")
    return jax.make_mesh(tuple(layout.axes.values()), tuple(layout.axes), devices=devices)


def mesh_of_ranks(mesh: Mesh) -> Mesh:
    """Return the mesh with shardings left to XLA, also where the given one has them in the types of arrays.

    Raises:
        TypeError: `mesh` is not a mesh.
        ValueError: It has not the one axis "ranks".
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if mesh.axis_names != ("ranks",):
        raise ValueError(f'mesh must have the one axis "ranks", got {mesh.axis_names}')
    return Mesh(mesh.devices, mesh.axis_names)
