"""The precision that references compute in."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """Return `x` in float32, or in float64 where it has that dtype already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def to_e4m3(x: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.precision.to_e4m3`."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float8_e4m3fn)


def through_e4m3(x: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.precision.through_e4m3`."""
    # the barrier: under jit, XLA takes out what only loses precision
    return jax.lax.optimization_barrier(x.astype(jnp.float8_e4m3fn)).astype(x.dtype)
