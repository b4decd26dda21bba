"""MMDiT in JAX over the ranks of a mesh: the parameters lie there as partition rules say, the rest is left to XLA.

Each rank has some heads of each attention and some features of each hidden layer; all tokens are on every rank. Queries, keys and
values have matrices of their own, so that the reference's own text is cut by heads as it stands: XLA adds the ranks' products up
once for each branch of each stream, and moves nothing else.

    placed = shard_state(state, partition_rules.MMDIT, mesh)       once
    out = mmdit_of_placed(placed, latents, encoder_hidden_states, pooled_projections, timesteps, config=config)
"""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax.mesh import REPLICATED, mesh_of_ranks
from gaugeblock.optimized.jax.sharded_dit import shard_state
from gaugeblock.reference import validation
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.jax import mmdit as reference


def mmdit(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array,
    timesteps: jax.Array,
    *,
    config: MMDiTConfig,
    mesh: Mesh,
) -> jax.Array:
    """As `gaugeblock.reference.jax.mmdit.mmdit`, over the ranks of a mesh; arrays are global.

    Args: as of it; a state that does not lie on the mesh is brought there. And
        mesh: One axis, "ranks", whose size divides num_attention_heads.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks", or its ranks do not divide the size above.

    Source: gaugeblock.reference.jax.mmdit; Shoeybi et al. 2019 (arXiv:1909.08053), section 3.
    """
    arrays = latents, encoder_hidden_states, pooled_projections, timesteps
    validation.mmdit(state, *arrays, config, reference.state_shapes(config))
    mesh = mesh_of_ranks(mesh)
    partition_rules.require_divisible(config, partition_rules.MMDIT, mesh.size)
    inputs = jax.device_put(arrays, NamedSharding(mesh, REPLICATED))
    return mmdit_of_placed(shard_state(state, partition_rules.MMDIT, mesh), *inputs, config=config)


mmdit_of_placed = jax.jit(reference.mmdit, static_argnames="config")
"""`mmdit` of a state as `shard_state` places it by `partition_rules.MMDIT`."""
