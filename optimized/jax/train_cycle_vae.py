"""The step of text-latent diffusion with cycles in JAX, compiled, with the batch and the state sharded over a mesh (`training`).

Which cycles an update has is known before: a run is compiled once for each choice of them, and a cycle that does not run costs
nothing.

Shapes: B batch_size.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gaugeblock.optimized.jax import training
from gaugeblock.optimized.jax.mesh import mesh_of_ranks
from gaugeblock.optimized.jax.training import Arrays, Batch
from gaugeblock.reference import validation
from gaugeblock.reference.configs import CycleVAEConfig
from gaugeblock.reference.jax import text_latent_mmdit
from gaugeblock.reference.jax import train_cycle_vae as reference


def train_step(
    state: Mapping[str, jax.Array],
    input_ids: jax.Array,
    latents: jax.Array,
    attention_mask: jax.Array | None,
    example_ids: jax.Array,
    *,
    config: CycleVAEConfig,
    mesh: Mesh,
) -> tuple[Arrays, reference.Metrics]:
    """Make one update on the mean loss of a batch of texts and their latents; the given state is not written to.

    Args: as of `gaugeblock.reference.jax.train_cycle_vae.train_step`; arrays are global. A state that does not lie as
        `training.shard_state` places it is brought there first. And
        mesh: One axis, "ranks", over which batch and state are sharded.

    Returns: as it; the state lies as `training.shard_state` places it.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks".

    Source: gaugeblock.reference.jax.train_cycle_vae; Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, stage 3.
    """
    shapes, frozen = text_latent_mmdit.state_shapes(config.model), reference.frozen_names(config)
    batch = input_ids, latents, attention_mask, example_ids
    validation.cycle_vae_step(state, *batch, config, shapes, frozen)
    mesh = mesh_of_ranks(mesh)
    shares = Shares(reference.cycles_run(state["step"], config=config))
    placed = training.place(batch, config, mesh)
    new_state, metrics = training.step(shares, state, placed, config=config, mesh=mesh)
    weights = reference.weight_metrics(state["step"], latents, config=config)
    everywhere = NamedSharding(mesh, training.REPLICATED)  # as all metrics lie, wherever the state and the batch were
    return new_state, reference.Metrics(**metrics, **jax.device_put(weights, everywhere))


class Shares(reference.Shares):
    """As `training.step` takes it; two of the same cycles are one to the compiler."""

    def __call__(  # type: ignore[override]
        self,
        parameters: Arrays,
        microbatch: Batch,
        counts: jax.Array,
        *,
        batch_size: jax.Array,
        step: jax.Array,
        config: CycleVAEConfig,
    ) -> tuple[jax.Array, Arrays]:
        """Return the share of a microbatch."""
        parts = self.example_parts(parameters, *microbatch, step=step, config=config)
        means = {name: jnp.where(counts, each, 0).sum() / batch_size for name, each in parts.items()}
        return reference.weighted(means, step, config=config)
