"""The image-diffusion training step in JAX, compiled, with the batch and the state sharded over a mesh.

Each rank holds a part of the batch, and of every parameter and its moments. XLA gathers a parameter for the ranks to
compute with, adds the ranks' gradients up, and has each rank update the part that it holds; on a mesh of one device it
is the plain step, compiled. The state that a step returns lies as the next one wants it, so that nothing is copied or
compiled again.

Shapes: B batch_size.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.reference import validation
from gaugeblock.reference.configs import ImageDiffusionConfig
from gaugeblock.reference.jax import dit
from gaugeblock.reference.jax import train_image_diffusion as reference

Arrays = dict[str, jax.Array]
Sums = tuple[jax.Array, Arrays]  # of the loss and the gradients


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
        ValueError: `mesh` has not the one axis "ranks".

    Source: gaugeblock.reference.jax.train_image_diffusion; Rajbhandari et al. 2020 (arXiv:1910.02054), section 5, stage 3.
    """
    shapes = dit.state_shapes(config.model)
    validation.image_diffusion_step(state, images, labels, example_ids, config.model, shapes)
    mesh = mesh_of_ranks(mesh)

    batch_size = images.shape[0]
    padding = -batch_size % (mesh.size * config.accumulation_steps)
    batch = [jnp.pad(each, ((0, padding), *[(0, 0)] * (each.ndim - 1))) for each in (images, labels, example_ids)]
    counts = jnp.arange(batch_size + padding) < batch_size
    batch = jax.device_put([*batch, counts], NamedSharding(mesh, OVER_RANKS))

    new_state, metrics, flaws = sharded_step(shard_state(state, mesh), *batch, config=config, mesh=mesh)
    flaws = {name: flaws[name] for name in shapes}  # jit sorts them
    reference.require_finite(state["step"], metrics["loss"], flaws, metrics["gradient_norm"])
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
    state: Arrays,
    images: jax.Array,
    labels: jax.Array,
    example_ids: jax.Array,
    counts: jax.Array,
    *,
    config: ImageDiffusionConfig,
    mesh: Mesh,
) -> tuple[Arrays, Arrays, Arrays]:
    """Make the update on a batch that divides by the ranks and microbatches, without looking at values.

    Args: as of `train_step`, and
        counts: [batch_size], bool: whether an example is one, not padding.

    Returns:
        new_state: As `train_step`.
        metrics: The fields of `Metrics`.
        flaws: For each gradient, [], NaN where it is not finite, else 0.
    """
    parameters = reference.part_of_state(state, "model")
    whole = NamedSharding(mesh, REPLICATED)
    parts = {name: sharding(parameter.shape, mesh) for name, parameter in parameters.items()}
    batch_size = counts.sum()

    def share_of_loss(
        parameters: Arrays, images: jax.Array, labels: jax.Array, example_ids: jax.Array, counts_B: jax.Array
    ) -> jax.Array:
        # parameters are what moves: left to itself, XLA may move activations
        parameters = jax.lax.with_sharding_constraint(parameters, whole)
        losses_B = reference.example_losses(parameters, images, labels, example_ids, state["step"], config=config)
        return jnp.where(counts_B, losses_B, 0).sum() / batch_size

    def add_microbatch(sums: Sums, microbatch: tuple[jax.Array, ...]) -> tuple[Sums, None]:
        shares = jax.value_and_grad(share_of_loss)(parameters, *microbatch)
        return jax.lax.with_sharding_constraint(jax.tree.map(jnp.add, sums, shares), (whole, parts)), None

    zeros = jnp.zeros((), images.dtype), jax.tree.map(jnp.zeros_like, parameters)
    # every accumulation_steps-th example: so each rank's examples lie in all microbatches, and none moves
    microbatches = jax.lax.with_sharding_constraint(
        tuple(
            each.reshape(-1, config.accumulation_steps, *each.shape[1:]).swapaxes(0, 1)
            for each in (images, labels, example_ids, counts)
        ),
        NamedSharding(mesh, PartitionSpec(None, "ranks")),
    )
    (loss, gradients), _ = jax.lax.scan(add_microbatch, zeros, microbatches)

    gradient_norm = reference.global_norm(gradients)
    new_state = reference.adamw_update(state, gradients, gradient_norm, config=config)
    places = {name: sharding(each.shape, mesh) for name, each in new_state.items()}
    new_state = jax.lax.with_sharding_constraint(new_state, places)
    flaws = {name: jnp.where(jnp.isfinite(gradient).all(), 0, jnp.nan) for name, gradient in gradients.items()}
    return new_state, {"loss": loss, "gradient_norm": gradient_norm}, flaws
