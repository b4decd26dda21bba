"""Rotary position embedding: queries and keys turn by angles that their places say.

Shapes: B batch_size, A num_heads, S tokens of a sequence, F features of a head, R = F / 2 pairs of features.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference.configs import RotaryPairs
from gaugeblock.reference.jax.norms import rms_norm


def rotary_table(
    places: jax.Array, *, features: tuple[int, ...], theta: float, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.rotary.rotary_table`."""
    with jax.enable_x64(True):
        angles = []
        for axis, size in enumerate(features):
            index_R = jnp.arange(0, size, 2, dtype=jnp.float64)
            angles.append(places[:, axis, None].astype(jnp.float64) * theta ** (-index_R / size))
        angle_SR = jnp.concatenate(angles, axis=-1)
        return jnp.cos(angle_SR).astype(dtype), jnp.sin(angle_SR).astype(dtype)


def rotate(heads: jax.Array, cos: jax.Array, sin: jax.Array, *, pairs: RotaryPairs) -> jax.Array:
    """As `gaugeblock.reference.torch.rotary.rotate`."""
    if pairs == "interleaved":
        x_BASR, y_BASR = heads[..., 0::2], heads[..., 1::2]
    else:
        x_BASR, y_BASR = jnp.split(heads, 2, axis=-1)
    turned = x_BASR * cos - y_BASR * sin, y_BASR * cos + x_BASR * sin
    return jnp.stack(turned, axis=-1).reshape(heads.shape) if pairs == "interleaved" else jnp.concatenate(turned, axis=-1)


def qk_norm_rotary(
    query: jax.Array,
    key: jax.Array,
    query_weight: jax.Array,
    key_weight: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    pairs: RotaryPairs,
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.rotary.qk_norm_rotary`."""
    query_BASF = rotate(rms_norm(query, query_weight, eps=eps), cos, sin, pairs=pairs)
    key_BASF = rotate(rms_norm(key, key_weight, eps=eps), cos, sin, pairs=pairs)
    return query_BASF, key_BASF
