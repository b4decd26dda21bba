"""What the training steps in JAX share: compiled, with the batch and the state sharded over a mesh.

Each rank holds a part of the batch, and of every parameter and its moments. XLA gathers a parameter for the ranks to
compute with, adds the ranks' gradients up, and has each rank update the part that it holds; on a mesh of one device it
is the plain step, compiled. The state that a step returns lies as the next one wants it, so that nothing is copied or
compiled again.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gaugeblock.optimized.jax.mesh import OVER_RANKS, REPLICATED, mesh_of_ranks
from gaugeblock.reference.configs import TrainingConfig
from gaugeblock.reference.jax import training
from gaugeblock.reference.jax.recomputation import blocks_recomputed

Arrays = dict[str, jax.Array]
Batch = tuple[Any, ...]  # arrays, and None for what a model is not told
Sums = tuple[Arrays, Arrays]  # of the metrics and the gradients
Placed = tuple[Batch, jax.Array]  # and what counts
Shares = Callable[..., tuple[jax.Array, Arrays]]


def step(
    shares: Shares,
    state: Mapping[str, jax.Array],
    placed: Placed,
    *,
    config: TrainingConfig,
    mesh: Mesh,
    rows_used: training.RowsUsed = training.all_rows,
) -> tuple[Arrays, Arrays]:
    """Make one update; the given state is not written to.

    A batch that does not divide by the ranks is padded with examples that do not count (`place`), which costs less than for
    every rank to compute all of it.

    Args:
        shares: A function of a module, of the parameters, in `compute_dtype`, a microbatch, a mask [examples] of those that
            count, and by name the `batch_size` of the whole, the `step` and the `config`: the microbatch's share of what is
            minimized, [], and of each metric, by name.
        state: As of `gaugeblock.reference.jax.training`. One that does not lie as `shard_state` places it is brought there first.
        placed: As `place` returns it: global arrays whose first axis is of the examples, None for what there is none of; and
            what counts of them.
        config: Of the run.
        mesh: One axis, "ranks".
        rows_used: As of the reference's `finish`, a function of a module.

    Returns:
        new_state: As state; it lies as `shard_state` places it.
        metrics: By name, and gradient_norm.

    Raises:
        FloatingPointError: A metric or a gradient is not finite; the message names the step and the first bad one.
    """
    sharded = shard_state(state, mesh)
    new_state, metrics, flaws = sharded_step(sharded, *placed, shares=shares, config=config, mesh=mesh, rows_used=rows_used)
    flaws = {name: flaws[name] for name in training.trained_names(state, config)}  # jit sorts them
    reported = {name: each for name, each in metrics.items() if name != "gradient_norm"}
    training.require_finite(state["step"], reported, flaws, metrics["gradient_norm"])
    return new_state, metrics


def place(batch: Batch, config: TrainingConfig, mesh: Mesh) -> Placed:
    """Return a batch over the ranks, padded with zeros so that it divides by ranks and microbatches, and what counts of it."""
    batch_size = len(batch[0])
    padding = padding_of(batch_size, config, mesh)
    padded = jax.tree.map(lambda each: jnp.pad(each, ((0, padding), *[(0, 0)] * (each.ndim - 1))), batch)
    counts = jnp.arange(batch_size + padding) < batch_size
    return jax.device_put((padded, counts), NamedSharding(mesh, OVER_RANKS))


def padding_of(batch_size: int, config: TrainingConfig, mesh: Mesh) -> int:
    """Return how many examples a batch lacks to divide among ranks and microbatches."""
    return -batch_size % (mesh.size * config.accumulation_steps)


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


@partial(jax.jit, static_argnames=("shares", "config", "mesh", "rows_used"))
def sharded_step(
    state: Arrays,
    batch: Batch,
    counts: jax.Array,
    *,
    shares: Shares,
    config: TrainingConfig,
    mesh: Mesh,
    rows_used: training.RowsUsed = training.all_rows,
) -> tuple[Arrays, Arrays, Arrays]:
    """Make the update, without looking at values.

    Args: as of `step`, and
        batch: Divides by the ranks and microbatches.
        counts: [batch_size], bool: whether an example is one, not padding.

    Returns:
        new_state, metrics: As of `step`.
        flaws: For each gradient, [], NaN where it is not finite, else 0.
    """
    model = training.part_of_state(state, "model")
    leaves = {name: model[name] for name in training.trained_names(state, config)}
    whole = NamedSharding(mesh, REPLICATED)
    parts = {name: sharding(leaf.shape, mesh) for name, leaf in leaves.items()}
    of_batch = partial(shares, batch_size=counts.sum(), step=state["step"], config=config)

    def scaled(leaves: Arrays, microbatch: Batch, counts_B: jax.Array) -> tuple[jax.Array, Arrays]:
        # parameters are what moves: left to itself, XLA may move activations
        parameters = jax.lax.with_sharding_constraint(model | leaves, whole)
        parameters = {name: training.in_compute_dtype(each, config) for name, each in parameters.items()}
        with blocks_recomputed(config.activation_checkpointing):
            objective, metrics = of_batch(parameters, microbatch, counts_B)
        return objective * config.loss_scale, OrderedDict(metrics)  # jit sorts a dict

    def add_microbatch(sums: Sums, microbatch: tuple[Batch, jax.Array]) -> tuple[Sums, None]:
        gradients, metrics = jax.grad(scaled, has_aux=True)(leaves, *microbatch)
        return jax.lax.with_sharding_constraint(jax.tree.map(jnp.add, sums, (metrics, gradients)), (whole, parts)), None

    # every accumulation_steps-th example: so each rank's examples lie in all microbatches, and none moves
    size, count = len(counts) // config.accumulation_steps, config.accumulation_steps
    microbatches = jax.lax.with_sharding_constraint(
        jax.tree.map(lambda each: each.reshape(size, count, *each.shape[1:]).swapaxes(0, 1), (batch, counts)),
        NamedSharding(mesh, PartitionSpec(None, "ranks")),
    )
    _, reported = jax.eval_shape(scaled, leaves, *jax.tree.map(lambda each: each[0], microbatches))
    zeros = jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), (reported, leaves))
    (metrics, gradients), _ = jax.lax.scan(add_microbatch, zeros, microbatches)

    gradients = {name: gradient / config.loss_scale for name, gradient in gradients.items()}
    gradient_norm = training.global_norm(gradients)
    used = rows_used(metrics, config=config)
    new_state = training.update(state, gradients, gradient_norm, config=config, used=used)
    places = {name: sharding(each.shape, mesh) for name, each in new_state.items()}
    new_state = jax.lax.with_sharding_constraint(new_state, places)
    flaws = {name: jnp.where(jnp.isfinite(gradient).all(), 0, jnp.nan) for name, gradient in gradients.items()}
    return new_state, metrics | {"gradient_norm": gradient_norm}, flaws
