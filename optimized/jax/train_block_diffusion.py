"""The block diffusion step in JAX, compiled, with the batch and the state sharded over a mesh (`training`).

Tokens are masked before the batch is padded: what pads it has no weight.

Shapes: B batch_size, S num_tokens.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from gaugeblock.optimized.jax import training
from gaugeblock.optimized.jax.mesh import mesh_of_ranks
from gaugeblock.optimized.jax.training import Arrays, Batch
from gaugeblock.reference import validation
from gaugeblock.reference.configs import BlockDiffusionConfig
from gaugeblock.reference.jax import language_models
from gaugeblock.reference.jax import train_block_diffusion as reference


def train_step(
    state: Mapping[str, jax.Array],
    input_ids: jax.Array,
    labels: jax.Array,
    sample_ids: jax.Array,
    example_ids: jax.Array,
    *,
    config: BlockDiffusionConfig,
    mesh: Mesh,
) -> tuple[Arrays, reference.Metrics]:
    """Make one update on tokens that are masked; the given state is not written to.

    Args: as of `gaugeblock.reference.jax.train_block_diffusion.train_step`; arrays are global. A state that does not lie
        as `training.shard_state` places it is brought there first. And
        mesh: One axis, "ranks", over which batch and state are sharded.

    Returns: as it; the state lies as `training.shard_state` places it.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks".

    Source: gaugeblock.reference.jax.train_block_diffusion; Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, stage 3.
    """
    shapes = language_models.state_shapes(config.model)
    validation.block_diffusion_step(state, input_ids, labels, sample_ids, example_ids, config, shapes)
    mesh = mesh_of_ranks(mesh)
    arrays, dtype = (input_ids, labels, sample_ids, example_ids), state[f"model.{next(iter(shapes))}"].dtype
    batch = reference.weighted_batch(*arrays, int(state["step"]), dtype=dtype, config=config)
    placed = training.place(batch, config, mesh)
    new_state, metrics = training.step(shares, state, placed, config=config, mesh=mesh)
    return new_state, reference.Metrics(**metrics)


def shares(parameters: Arrays, microbatch: Batch, counts: jax.Array, **of_run: Any) -> tuple[jax.Array, Arrays]:
    """As `training.step` takes it."""
    return reference.shares(parameters, *microbatch, **of_run)
