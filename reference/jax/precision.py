"""The precision that references compute in."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """Return `x` in float32, or in float64 where it has that dtype already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
