"""The step of an upcycled GPT-2 in JAX, compiled, with the batch and the state sharded over a mesh (`training`).

Of several microbatches each has every n-th example of the batch, on every rank; so their balance losses are of other examples
than the reference's. With one microbatch there is no difference.

Shapes: L num_moe_layers, E num_experts.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gaugeblock.optimized.jax import training
from gaugeblock.optimized.jax.mesh import mesh_of_ranks
from gaugeblock.optimized.jax.training import Arrays, Batch
from gaugeblock.reference import validation
from gaugeblock.reference.configs import MoELMConfig
from gaugeblock.reference.jax import train_moe_lm as reference
from gaugeblock.reference.jax import upcycled_gpt2


def train_step(
    state: Mapping[str, jax.Array],
    input_ids: jax.Array,
    labels: jax.Array,
    example_ids: jax.Array,
    *,
    config: MoELMConfig,
    mesh: Mesh,
) -> tuple[Arrays, reference.Metrics]:
    """Make one update on the losses of a batch; the given state is not written to.

    Args: as of `gaugeblock.reference.jax.train_moe_lm.train_step`; arrays are global. A state that does not lie as
        `training.shard_state` places it is brought there first. And
        mesh: One axis, "ranks", over which batch and state are sharded.

    Returns: as it; the state lies as `training.shard_state` places it.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks".

    Source: gaugeblock.reference.jax.train_moe_lm; Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, stage 3.
    """
    model = config.model
    stacked = upcycled_gpt2.expert_names(model)
    validation.moe_lm_step(state, input_ids, labels, example_ids, config, upcycled_gpt2.state_shapes(model), stacked)
    mesh = mesh_of_ranks(mesh)
    weights = reference.label_weights(labels, dtype=state[f"model.{upcycled_gpt2.TOKENS}"].dtype)
    placed = training.place((input_ids, labels, weights, example_ids), config, mesh)
    new_state, metrics = training.step(shares, state, placed, config=config, mesh=mesh, rows_used=reference.experts_used)
    return new_state, reference.Metrics(**metrics)


def shares(
    parameters: Arrays,
    microbatch: Batch,
    counts: jax.Array,
    *,
    batch_size: jax.Array,
    step: jax.Array,
    config: MoELMConfig,
) -> tuple[jax.Array, Arrays]:
    """As `training.step` takes it."""
    input_ids, labels, weights, example_ids = microbatch
    noise = reference.noise(example_ids, input_ids.shape[1], step, dtype=weights.dtype, config=config)
    outputs = upcycled_gpt2.upcycled_gpt2(parameters, input_ids, noise, training=True, config=config.model)
    example_shares = counts.astype(weights.dtype) / batch_size
    # of padding no token counts; a microbatch may hold nothing else
    load_LE = jnp.where(counts[:, None, None], outputs[4], 0).sum(axis=0) / jnp.maximum(counts.sum(), 1)
    return reference.shares_of_outputs(outputs, labels, weights, example_shares, load_LE, config=config)
