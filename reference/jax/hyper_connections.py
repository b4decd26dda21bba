"""Manifold-constrained hyper-connections: how a branch reads and mixes several residual streams.

Shapes: B batch_size, S tokens, K residual streams, D hidden_size, L what is made of each stream of the read, one, and of the K
that they become.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32

SMALLEST_NORM = 1e-12  # what vectors are divided by at least
SINKHORN_ROUNDS = 20

State = Mapping[str, jax.Array]


def hyper_connection(state: State, streams: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.hyper_connections.hyper_connection`."""
    validation.hyper_connection(state, streams)
    wide = {name: at_least_float32(parameter) for name, parameter in state.items()}
    read_BSD, mixed_BSKD, write_BSK = connection(wide, at_least_float32(streams))
    return read_BSD.astype(streams.dtype), mixed_BSKD.astype(streams.dtype), write_BSK


def connection(state: State, streams: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what `hyper_connection` does, in the dtype of the streams; nothing is checked."""
    normalized_BSKD = divided_by_norm(streams) * (1 + state["norm.gamma"])
    alpha_BSKL = jnp.matmul(normalized_BSKD, state["dynamic_alpha_fn"][0], precision="highest")  # the first of L is what is read
    read_BSK = jax.nn.sigmoid(state["pre_branch_scale"] * alpha_BSKL[..., 0] + state["static_alpha"][:, 0])
    mix_BSKL = doubly_stochastic(state["residual_scale"] * alpha_BSKL[..., 1:] + state["static_alpha"][:, 1:])
    beta_BSK1 = (
        state["h_post_scale"] * jnp.matmul(normalized_BSKD, state["dynamic_beta_fn"], precision="highest")
        + state["static_beta"][:, 0]
    )
    read_BSD = (read_BSK[..., None] * streams).sum(axis=2)
    return read_BSD, jnp.matmul(mix_BSKL.mT, streams, precision="highest"), 2 * jax.nn.sigmoid(beta_BSK1[..., 0])


def divided_by_norm(vectors: jax.Array) -> jax.Array:
    """Bring the last axis to a root mean square of 1; one that is 0 stays so."""
    squares = (vectors * vectors).sum(axis=-1, keepdims=True)
    # of squares, since a norm has no gradient at 0
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, SMALLEST_NORM**2)) * vectors.shape[-1] ** 0.5


def doubly_stochastic(scores: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.hyper_connections.doubly_stochastic`."""

    def sinkhorn_round(_: int, scores: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(jax.nn.log_softmax(scores, axis=-2), axis=-1)

    return jnp.exp(jax.lax.fori_loop(0, SINKHORN_ROUNDS, sinkhorn_round, scores))
