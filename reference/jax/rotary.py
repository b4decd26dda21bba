"""Rotary position embedding: queries and keys turn by angles that their places say.

Shapes: B batch_size, A num_heads, S tokens of a sequence, F features of a head, R = F / 2 pairs of features.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import RotaryPairs
from gaugeblock.reference.jax.norms import rms_norm
from gaugeblock.reference.jax.precision import at_least_float32


def rotary_table(
    places: jax.Array, *, features: tuple[int, ...], theta: float, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.rotary.rotary_table`."""
    validation.rotary_table(places, features, theta, str(jnp.dtype(dtype)))
    with jax.enable_x64(True):
        angles = []
        for axis, size in enumerate(features):
            index_R = jnp.arange(0, size, 2, dtype=jnp.float64)
            angles.append(places[:, axis, None].astype(jnp.float64) * theta ** (-index_R / size))
        angle_SR = jnp.concatenate(angles, axis=-1)
        return jnp.cos(angle_SR).astype(dtype), jnp.sin(angle_SR).astype(dtype)


def rotate(heads: jax.Array, cos: jax.Array, sin: jax.Array, *, pairs: RotaryPairs) -> jax.Array:
    """As `gaugeblock.reference.torch.rotary.rotate`."""
    validation.rotate(heads, cos, sin, pairs)
    heads_BASF, cos_SR, sin_SR = at_least_float32(heads), at_least_float32(cos), at_least_float32(sin)
    if pairs == "interleaved":
        x_BASR, y_BASR = heads_BASF[..., 0::2], heads_BASF[..., 1::2]
    else:
        x_BASR, y_BASR = jnp.split(heads_BASF, 2, axis=-1)
    turned = x_BASR * cos_SR - y_BASR * sin_SR, y_BASR * cos_SR + x_BASR * sin_SR
    out_BASF = jnp.stack(turned, axis=-1).reshape(heads.shape) if pairs == "interleaved" else jnp.concatenate(turned, axis=-1)
    return out_BASF.astype(heads.dtype)


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
    validation.qk_norm_rotary(query, key, query_weight, key_weight, cos, sin, eps, pairs)
    query_BASF = rms_norm(at_least_float32(query), at_least_float32(query_weight), eps=eps)
    key_BASF = rms_norm(at_least_float32(key), at_least_float32(key_weight), eps=eps)
    turned_BASF, turned_key_BASF = (rotate(each, cos, sin, pairs=pairs) for each in (query_BASF, key_BASF))
    return turned_BASF.astype(query.dtype), turned_key_BASF.astype(key.dtype)
