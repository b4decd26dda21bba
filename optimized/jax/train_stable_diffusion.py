"""The Stable Diffusion training step in JAX, compiled, with the batch and the state sharded over a mesh (`training`).

What is frozen lies on the ranks as the state does, and is gathered where it encodes each rank's part of the batch.

Shapes: B batch_size.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gaugeblock.optimized.jax import training
from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.optimized.jax.training import Arrays, Batch
from gaugeblock.reference import validation
from gaugeblock.reference.configs import StableDiffusionConfig
from gaugeblock.reference.jax import clip_text
from gaugeblock.reference.jax import train_stable_diffusion as reference


def train_step(
    state: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    images: jax.Array,
    input_ids: jax.Array,
    time_ids: jax.Array,
    example_ids: jax.Array,
    *,
    config: StableDiffusionConfig,
    mesh: Mesh,
) -> tuple[Arrays, reference.Metrics]:
    """Make one update on the mean loss of a batch of images and captions; the given state is not written to.

    Args: as of `gaugeblock.reference.jax.train_stable_diffusion.train_step`; arrays are global. A state that does not lie
        as `training.shard_state` places it is brought there first, and so is what is frozen. And
        mesh: One axis, "ranks", over which batch, state and what is frozen are sharded.

    Returns: as it; the state lies as `training.shard_state` places it.

    Raises: as it, and
        TypeError: `mesh` is not a mesh.
        ValueError: `mesh` has not the one axis "ranks".

    Source: gaugeblock.reference.jax.train_stable_diffusion; Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, stage 3.
    """
    shapes = reference.state_shapes(config), reference.frozen_shapes(config), reference.unused_names(config)
    validation.stable_diffusion_step(state, frozen, images, input_ids, time_ids, example_ids, config, *shapes)
    return _step(state, frozen, (images, input_ids, None, None, time_ids, example_ids), config, mesh)


def train_step_on_embeddings(
    state: Mapping[str, jax.Array],
    frozen: Mapping[str, jax.Array],
    images: jax.Array,
    encoder_hidden_states: jax.Array,
    text_embeds: jax.Array | None,
    time_ids: jax.Array,
    example_ids: jax.Array,
    *,
    config: StableDiffusionConfig,
    mesh: Mesh,
) -> tuple[Arrays, reference.Metrics]:
    """As `train_step`, on captions that are encoded already; as of the reference."""
    texts = encoder_hidden_states, text_embeds
    shapes = reference.state_shapes(config), reference.frozen_shapes(config, with_text_encoders=False)
    validation.stable_diffusion_step_on_embeddings(state, frozen, images, *texts, time_ids, example_ids, config, *shapes)
    return _step(state, frozen, (images, None, *texts, time_ids, example_ids), config, mesh)


def _step(
    state: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array], batch: Batch, config: StableDiffusionConfig, mesh: Mesh
) -> tuple[Arrays, reference.Metrics]:
    mesh = mesh_of_ranks(mesh)
    placed, counts = training.place(batch, config, mesh)
    sharded, sharded_frozen = training.shard_state(state, mesh), training.shard_state(frozen, mesh)
    encoded = encoded_batch(sharded_frozen, placed, sharded["step"], config=config, mesh=mesh)
    new_state, metrics = training.step(shares, sharded, (encoded, counts), config=config, mesh=mesh)
    return new_state, reference.Metrics(**metrics)


@partial(jax.jit, static_argnames=("config", "mesh"))
def encoded_batch(frozen: Arrays, batch: Batch, step: jax.Array, *, config: StableDiffusionConfig, mesh: Mesh) -> Batch:
    """Return a batch with latents for images, and with texts for ids of tokens whose encoders are frozen."""
    frozen = jax.lax.with_sharding_constraint(frozen, NamedSharding(mesh, REPLICATED))
    images, input_ids, *texts, time_ids, example_ids = batch
    latents = reference.encode_images(frozen, images, example_ids, step, config=config)
    if input_ids is not None and not config.train_text_encoder:
        texts, input_ids = [*reference.encode_texts(frozen, input_ids, config=config)], None
    encoded = (latents, input_ids, *texts, time_ids, example_ids)
    return jax.lax.with_sharding_constraint(encoded, NamedSharding(mesh, OVER_RANKS))


def shares(
    parameters: Arrays,
    microbatch: Batch,
    counts: jax.Array,
    *,
    batch_size: jax.Array,
    step: jax.Array,
    config: StableDiffusionConfig,
) -> tuple[jax.Array, Arrays]:
    """As `training.step` takes it."""
    model: Any = partial(reference.predict, clip_text.clip_text, reference.denoiser(config), parameters, config=config)
    losses_B = reference.example_losses(model, *microbatch, step=step, config=config)
    loss = jnp.where(counts, losses_B, 0).sum() / batch_size
    return loss, {"loss": loss}
