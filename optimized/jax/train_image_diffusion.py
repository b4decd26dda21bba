"""The image-diffusion training step in JAX, compiled, with the batch and the state sharded over a mesh (`training`).

Shapes: B batch_size.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gaugeblock.optimized.jax import training
from gaugeblock.optimized.jax.mesh import mesh_of_ranks
from gaugeblock.optimized.jax.training import Arrays, Batch
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEModelConfig, ImageDiffusionConfig
from gaugeblock.reference.jax import image_models
from gaugeblock.reference.jax import train_image_diffusion as reference


def train_step(
    state: Mapping[str, jax.Array],
    images: jax.Array,
    labels: jax.Array,
    example_ids: jax.Array,
    *,
    config: ImageDiffusionConfig,
    mesh: Mesh,
) -> tuple[Arrays, reference.Metrics]:
    """Make one update of AdamW on the mean loss of a batch; the given state is not written to.

    Args: as of `gaugeblock.reference.jax.train_image_diffusion.train_step`; arrays are global. A state that does not lie
        as `training.shard_state` places it is brought there first. And
        mesh: One axis, "ranks", over which batch and state are sharded.

    Returns: as it; the state lies as `training.shard_state` places it.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks"; or a DiT-MoE's batch does not divide by the ranks and microbatches:
            padding would count in the load of its experts.

    Source: gaugeblock.reference.jax.train_image_diffusion; Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, stage 3.
    """
    shapes = image_models.state_shapes(config.model)
    validation.image_diffusion_step(state, images, labels, example_ids, config, shapes)
    return _step(state, (images, labels, None, None, example_ids), config, mesh)


def train_step_on_texts(
    state: Mapping[str, jax.Array],
    images: jax.Array,
    encoder_hidden_states: jax.Array,
    pooled_projections: jax.Array | None,
    example_ids: jax.Array,
    *,
    config: ImageDiffusionConfig,
    mesh: Mesh,
) -> tuple[Arrays, reference.Metrics]:
    """As `train_step`, of a model that is told texts; these as of the reference."""
    texts = encoder_hidden_states, pooled_projections
    shapes, frozen = image_models.state_shapes(config.model), image_models.frozen_names(config.model)
    validation.image_diffusion_step_on_texts(state, images, *texts, example_ids, config, shapes, frozen)
    return _step(state, (images, None, *texts, example_ids), config, mesh)


def _step(
    state: Mapping[str, jax.Array], batch: Batch, config: ImageDiffusionConfig, mesh: Mesh
) -> tuple[Arrays, reference.Metrics]:
    mesh = mesh_of_ranks(mesh)
    if isinstance(config.model, DiTMoEModelConfig) and training.padding_of(len(batch[0]), config, mesh):
        parts = f"{mesh.size} ranks and {config.accumulation_steps} microbatches"
        examples = f"{len(batch[0])} examples, whose padding would count in the load"
        raise ValueError(f"images must divide among {parts}, got {examples}")
    placed = training.place(batch, config, mesh)
    new_state, metrics = training.step(shares, state, placed, config=config, mesh=mesh)
    return new_state, reference.Metrics(**metrics)


def shares(
    parameters: Arrays,
    microbatch: Batch,
    counts: jax.Array,
    *,
    batch_size: jax.Array,
    step: jax.Array,
    config: ImageDiffusionConfig,
) -> tuple[jax.Array, Arrays]:
    """As `training.step` takes it."""
    model = partial(image_models.operation(config.model), parameters, config=config.model)
    losses_B, auxiliary_loss = reference.example_losses(model, *microbatch, step=step, config=config)
    loss, auxiliary_loss = jnp.where(counts, losses_B, 0).sum() / batch_size, auxiliary_loss * counts.sum() / batch_size
    return loss + auxiliary_loss, {"loss": loss, "auxiliary_loss": auxiliary_loss}
