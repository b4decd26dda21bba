"""The mesh that the sharded versions run on."""

from jax.sharding import Mesh, PartitionSpec

OVER_RANKS = PartitionSpec("ranks")
REPLICATED = PartitionSpec()


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
