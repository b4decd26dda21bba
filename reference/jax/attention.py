"""Attention of queries to keys, with several heads.

Shapes: B batch_size, S tokens that ask, T tokens that are asked, A num_heads, F features of a head, D = A * F.
"""

import math

import jax
import jax.numpy as jnp


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """As `gaugeblock.reference.torch.attention.attention`."""
    scores_BAST = jnp.matmul(query, key.mT, precision="highest") / math.sqrt(query.shape[-1])
    if mask is None:
        return jnp.matmul(jax.nn.softmax(scores_BAST, axis=-1), value, precision="highest")
    # of a row without any key softmax and its gradient are NaN, so it sees all keys and is left out afterwards
    is_lost = ~mask.any(axis=-1, keepdims=True)
    probabilities_BAST = jax.nn.softmax(jnp.where(mask | is_lost, scores_BAST, -jnp.inf), axis=-1)
    return jnp.matmul(jnp.where(is_lost, 0.0, probabilities_BAST), value, precision="highest")


def split_heads(tokens: jax.Array, num_heads: int) -> jax.Array:
    """As `gaugeblock.reference.torch.attention.split_heads`."""
    batch_size, num_tokens, hidden_size = tokens.shape
    return tokens.reshape(batch_size, num_tokens, num_heads, hidden_size // num_heads).swapaxes(1, 2)


def join_heads(heads: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.attention.join_heads`."""
    batch_size, num_heads, num_tokens, features = heads.shape
    return heads.swapaxes(1, 2).reshape(batch_size, num_tokens, num_heads * features)
