"""The image-diffusion training step in JAX, compiled, with the batch and the state sharded over a mesh.

Each rank holds a part of the batch, and of every parameter and its moments. XLA gathers a parameter for the ranks to
compute with, adds the ranks' gradients up, and has each rank update the part that it holds; on a mesh of one device it
is the plain step, compiled. The state that a step returns lies as the next one wants it, so that nothing is copied or
compiled again.

Shapes: B batch_size.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEModelConfig, ImageDiffusionConfig
from gaugeblock.reference.jax import image_models, training
from gaugeblock.reference.jax import train_image_diffusion as reference
from gaugeblock.reference.jax.recomputation import blocks_recomputed

Arrays = dict[str, jax.Array]
Batch = tuple[Any, ...]  # arrays, and None for what a model is not told
Sums = tuple[Arrays, Arrays]  # of the losses and the gradients


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

    A batch that does not divide by the ranks is padded with examples that do not count, which costs less than for every
    rank to compute all of it.

    Args: as of `gaugeblock.reference.jax.train_image_diffusion.train_step`; arrays are global. A state that does not lie
        as `shard_state` places it is brought there first. And
        mesh: One axis, "ranks", over which batch and state are sharded.

    Returns: as it; the state lies as `shard_state` places it.

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
    batch_size = len(batch[0])
    padding = -batch_size % (mesh.size * config.accumulation_steps)
    if padding and isinstance(config.model, DiTMoEModelConfig):
        parts = f"{mesh.size} ranks and {config.accumulation_steps} microbatches"
        raise ValueError(f"images must divide among {parts}, got {batch_size} examples, whose padding would count in the load")
    padded = jax.tree.map(lambda each: jnp.pad(each, ((0, padding), *[(0, 0)] * (each.ndim - 1))), batch)
    counts = jnp.arange(batch_size + padding) < batch_size
    placed, counts = jax.device_put((padded, counts), NamedSharding(mesh, OVER_RANKS))

    new_state, metrics, flaws = sharded_step(shard_state(state, mesh), placed, counts, config=config, mesh=mesh)
    flaws = {name: flaws[name] for name in training.trained_names(state, config)}  # jit sorts them
    losses = {name: metrics[name] for name in ("loss", "auxiliary_loss")}
    training.require_finite(state["step"], losses, flaws, metrics["gradient_norm"])
    return new_state, reference.Metrics(**metrics)


def shard_state(state: Mapping[str, jax.Array], mesh: Mesh) -> Arrays:
    """Place a state on the ranks: each array in parts along its largest dimension that they divide, else whole on each."""
    mesh = mesh_of_ranks(mesh)
    return jax.device_put(dict(state), {name: sharding(array.shape, mesh) for name, array in state.items()})


def sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Return how an array of the state lies on the ranks."""
    divisible = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not divisible:
        return NamedSharding(mesh, REPLICATED)
    largest = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, "ranks"))


@partial(jax.jit, static_argnames=("config", "mesh"))
def sharded_step(
    state: Arrays, batch: Batch, counts: jax.Array, *, config: ImageDiffusionConfig, mesh: Mesh
) -> tuple[Arrays, Arrays, Arrays]:
    """Make the update on a batch that divides by the ranks and microbatches, without looking at values.

    Args: as of the steps, and
        batch: As of the reference's `losses_and_gradients`.
        counts: [batch_size], bool: whether an example is one, not padding.

    Returns:
        new_state: As the steps.
        metrics: The fields of `Metrics`.
        flaws: For each gradient, [], NaN where it is not finite, else 0.
    """
    model = training.part_of_state(state, "model")
    leaves = {name: model[name] for name in training.trained_names(state, config)}
    whole = NamedSharding(mesh, REPLICATED)
    parts = {name: sharding(leaf.shape, mesh) for name, leaf in leaves.items()}
    batch_size = counts.sum()

    def scaled(leaves: Arrays, microbatch: Batch, counts_B: jax.Array) -> tuple[jax.Array, Arrays]:
        # parameters are what moves: left to itself, XLA may move activations
        parameters = jax.lax.with_sharding_constraint(model | leaves, whole)
        parameters = {name: training.in_compute_dtype(each, config) for name, each in parameters.items()}
        called = partial(image_models.operation(config.model), parameters, config=config.model)
        with blocks_recomputed(config.activation_checkpointing):
            losses_B, auxiliary_loss = reference.example_losses(called, *microbatch, step=state["step"], config=config)
        shares = {
            "loss": jnp.where(counts_B, losses_B, 0).sum() / batch_size,
            "auxiliary_loss": auxiliary_loss * counts_B.sum() / batch_size,
        }
        return (shares["loss"] + shares["auxiliary_loss"]) * config.loss_scale, shares

    def add_microbatch(sums: Sums, microbatch: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
        gradients, shares = jax.grad(scaled, has_aux=True)(leaves, *microbatch)
        return jax.lax.with_sharding_constraint(jax.tree.map(jnp.add, sums, (shares, gradients)), (whole, parts)), None

    zero = jnp.zeros((), batch[0].dtype)
    zeros = {"loss": zero, "auxiliary_loss": zero}, jax.tree.map(jnp.zeros_like, leaves)
    # every accumulation_steps-th example: so each rank's examples lie in all microbatches, and none moves
    microbatches = jax.lax.with_sharding_constraint(
        jax.tree.map(lambda each: each.reshape(-1, config.accumulation_steps, *each.shape[1:]).swapaxes(0, 1), (batch, counts)),
        NamedSharding(mesh, PartitionSpec(None, "ranks")),
    )
    (losses, gradients), _ = jax.lax.scan(add_microbatch, zeros, microbatches)

    gradients = {name: gradient / config.loss_scale for name, gradient in gradients.items()}
    gradient_norm = training.global_norm(gradients)
    new_state = training.update(state, gradients, gradient_norm, config=config)
    places = {name: sharding(each.shape, mesh) for name, each in new_state.items()}
    new_state = jax.lax.with_sharding_constraint(new_state, places)
    flaws = {name: jnp.where(jnp.isfinite(gradient).all(), 0, jnp.nan) for name, gradient in gradients.items()}
    return new_state, losses | {"gradient_norm": gradient_norm}, flaws
