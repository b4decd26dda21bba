"""Random numbers that depend on nothing but what they are for: Philox 4x32-10, a counter-based generator.

Every draw is keyed by (seed, step, example, purpose), so it depends neither on other draws nor on batch
order, world size or framework. A draw is a sequence of 32-bit words; words 4 b to 4 b + 3 are block b:

    block b = philox_4x32(counter=(b, step, example, purpose), key=(seed mod 2**32, seed div 2**32))

    seed     0 .. 2**64 - 1    one per run
    step     0 .. 2**32 - 1    of the training or the sampling
    example  0 .. 2**32 - 1    index in the data set, not in the batch
    purpose  0 .. 2**32 - 1    one for each kind of draw: noise, timesteps, dropout, ...

In Triton, block b is `tl.philox(seed, b, step, example, purpose)` of uint32 tensors; where step, example and
purpose are 0, it is `tl.randint4x(seed, b)`. The kernels are in `gaugeblock.optimized.triton.random`.

The words are the same bits in torch, JAX and Triton, and so is `uniform`. `normal` is computed in float64 and
rounded once to float32: the same bits too, unless the float64 results of two mathematics libraries lie on
either side of a rounding boundary (about one number in 10**8), which then costs one unit in the last place.

Source: Salmon, Moraes, Dror, Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011), section 3.3.
"""

import math

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
ROUNDS = 10


def normal(shape: tuple[int, ...], *, seed: int, step: int | jax.Array, example: int | jax.Array, purpose: int) -> jax.Array:
    """As `gaugeblock.reference.torch.random.normal`."""
    blocks = _blocks(shape, seed, step, example, purpose)
    with jax.enable_x64(True):
        words = blocks.astype(jnp.float64).reshape(*blocks.shape[:-1], 2, 2)
        radius = jnp.sqrt(-2 * jnp.log((words[..., 0] + 1) * 2.0**-32))
        angle = words[..., 1] * 2.0**-32 * (2 * math.pi)
        pairs = jnp.stack([radius * jnp.cos(angle), radius * jnp.sin(angle)], axis=-1)
        normals = pairs.astype(jnp.float32).reshape(blocks.shape)
    return _draw(normals, shape)


def uniform(shape: tuple[int, ...], *, seed: int, step: int | jax.Array, example: int | jax.Array, purpose: int) -> jax.Array:
    """As `gaugeblock.reference.torch.random.uniform`."""
    words = bits(shape, seed=seed, step=step, example=example, purpose=purpose)
    return (words >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def bits(shape: tuple[int, ...], *, seed: int, step: int | jax.Array, example: int | jax.Array, purpose: int) -> jax.Array:
    """As `gaugeblock.reference.torch.random.bits`, but words are uint32, and `step` may be a scalar that is traced."""
    return _draw(_blocks(shape, seed, step, example, purpose), shape)


def philox_4x32(counter: jax.Array, key: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.random.philox_4x32`, but all words are uint32."""
    c0, c1, c2, c3 = jnp.unstack(counter, axis=-1)
    k0, k1 = jnp.unstack(key, axis=-1)
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + jnp.uint32(KEY_INCREMENTS[0]), k1 + jnp.uint32(KEY_INCREMENTS[1])
    return jnp.stack([c0, c1, c2, c3], axis=-1)


def _multiply(a: int, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the high and the low word of a product of two words."""
    # in halves of both: JAX has no uint64 unless x64 is on, and no product of halves exceeds a word
    a_high, a_low = jnp.uint32(a >> 16), jnp.uint32(a & 0xFFFF)
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = a_low * b_high + (a_low * b_low >> 16)
    carry = a_high * b_low + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (carry >> 16), jnp.uint32(a) * b


def _blocks(shape: tuple[int, ...], seed: int, step: int | jax.Array, example: int | jax.Array, purpose: int) -> jax.Array:
    """Return the blocks that a draw needs, [*example.shape, num_blocks, 4]."""
    validation.random_draw(seed, step, example, purpose)
    examples = jnp.asarray(example, jnp.uint32)[..., None]
    block = jnp.arange(-(-math.prod(shape) // 4), dtype=jnp.uint32)
    steps, purposes = jnp.full_like(block, step), jnp.full_like(block, purpose)
    counter = jnp.stack(jnp.broadcast_arrays(block, steps, examples, purposes), axis=-1)
    return philox_4x32(counter, jnp.array([seed & WORD, seed >> 32], jnp.uint32))


def _draw(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Cut blocks, [..., num_blocks, 4], to a draw, [..., *shape]."""
    words = blocks.reshape(*blocks.shape[:-2], 4 * blocks.shape[-2])
    return words[..., : math.prod(shape)].reshape((*blocks.shape[:-2], *shape))
