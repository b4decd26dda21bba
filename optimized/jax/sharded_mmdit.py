"""MMDiT in JAX over the ranks of a mesh: the parameters lie there as partition rules say, the rest is left to XLA.

Each rank has some heads of each attention and some features of each hidden layer; all tokens are on every rank. Queries, keys and
values have matrices of their own, so that the reference's own text is cut by heads as it stands: XLA adds the ranks' products up
once for each branch of each stream, and moves nothing else.

    placed = shard_state(state, partition_rules.MMDIT, mesh)       once
    out = mmdit_of_placed(placed, latents, encoder_hidden_states, pooled_projections, timesteps, config=config, mesh=mesh)
"""

from functools import partial

import jax
from jax.sharding import Mesh

from gaugeblock.optimized import partition_rules
from gaugeblock.optimized.jax.sharded_models import run_on_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.jax import mmdit as reference


def mmdit(
    state: reference.State,
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
    return run_on_ranks(mmdit_of_placed, partition_rules.MMDIT, state, *arrays, config=config, mesh=mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def mmdit_of_placed(
    placed: reference.State,
    latents: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array,
    timesteps: jax.Array,
    *,
    config: MMDiTConfig,
    mesh: Mesh,
) -> jax.Array:
    """Do what `mmdit` does with a state as `shard_state` places it by `partition_rules.MMDIT`; values are not checked."""
    return reference.mmdit(placed, latents, encoder_hidden_states, pooled_projections, timesteps, config=config)
