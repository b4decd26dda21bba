"""In which order a training run takes its examples: a function of its seed and step, so that a saved run needs to keep no place.

Examples are counted 0 .. num_examples - 1. A run goes over all of them again and again, each time in another order; a batch may
end one pass and begin the next. An order is never written down: where an example stands in it is computed for it alone.

Shapes: B batch_size.
"""

from functools import partial

import jax
import jax.numpy as jnp

from gaugeblock.reference import purposes, validation
from gaugeblock.reference.jax import random

ROUNDS = 8
WORD = 0xFFFFFFFF


def batch_ids(step: int, *, batch_size: int, num_examples: int, seed: int) -> jax.Array:
    """As `gaugeblock.reference.torch.data_order.batch_ids`, but uint32."""
    validation.batch_ids(step, batch_size, num_examples, seed)
    with jax.enable_x64(True):
        places_B = jnp.arange(batch_size, dtype=jnp.int64) + step * batch_size
        ids = shuffled(places_B % num_examples, places_B // num_examples, num_examples=num_examples, seed=seed)
        return ids.astype(jnp.uint32)


@partial(jax.jit, static_argnames=("num_examples", "seed"))
def shuffled(places: jax.Array, passes: jax.Array, *, num_examples: int, seed: int) -> jax.Array:
    """As `gaugeblock.reference.torch.data_order.shuffled`, but of int64, so within `jax.enable_x64`."""
    half = max(1, -(-(num_examples - 1).bit_length() // 2))
    ids_B = _permuted(places, passes, half, seed)
    return jax.lax.while_loop(
        lambda ids: (ids >= num_examples).any(),
        lambda ids: jnp.where(ids >= num_examples, _permuted(ids, passes, half, seed), ids),
        ids_B,
    )


def _permuted(numbers: jax.Array, passes: jax.Array, half: int, seed: int) -> jax.Array:
    """Permute numbers of 2 * half bits: in each round, one half is changed by a draw for the other."""
    most = (1 << half) - 1

    def permute_once(index: jax.Array, halves: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left_B, right_B = halves
        key_B = (((passes << half) + right_B) & WORD).astype(jnp.uint32)
        drawn_B = random.bits((), seed=seed, step=index, example=key_B, purpose=purposes.DATA_ORDER)
        return right_B, left_B ^ (drawn_B & most).astype(left_B.dtype)

    left_B, right_B = jax.lax.fori_loop(0, ROUNDS, permute_once, (numbers >> half, numbers & most))
    return left_B << half | right_B
