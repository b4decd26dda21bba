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

import torch

from gaugeblock.reference import validation

WORD = 0xFFFFFFFF  # torch has no arithmetic on uint32: words are int64 in 0..WORD
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
ROUNDS = 10


def normal(shape: tuple[int, ...], *, seed: int, step: int, example: int | torch.Tensor, purpose: int) -> torch.Tensor:
    """Draw standard normals by the transform of Box and Muller.

        u = (word_0 + 1) / 2**32,  v = word_1 / 2**32
        normal_0 = sqrt(-2 log(u)) * cos(2 pi v)
        normal_1 = sqrt(-2 log(u)) * sin(2 pi v), and in the same way for words and normals 2 and 3 of a block

    Args: as of `bits`.

    Returns:
        [*example.shape, *shape], float32, on the device of `example`, at most 6.67 in magnitude.

    Raises: as `bits`.

    Source: Box, Muller, A Note on the Generation of Random Normal Deviates (1958).
    """
    words = _blocks(shape, seed, step, example, purpose).double().unflatten(-1, (2, 2))
    radius = torch.sqrt(-2 * torch.log((words[..., 0] + 1) * 2.0**-32))
    angle = words[..., 1] * 2.0**-32 * (2 * math.pi)
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return _draw(pairs.float().flatten(-2), shape)


def uniform(shape: tuple[int, ...], *, seed: int, step: int, example: int | torch.Tensor, purpose: int) -> torch.Tensor:
    """Draw uniformly from the multiples of 2**-24 in [0, 1): the high 24 bits of each word, exactly.

    Args: as of `bits`.

    Returns:
        [*example.shape, *shape], float32, on the device of `example`.

    Raises: as `bits`.
    """
    words = bits(shape, seed=seed, step=step, example=example, purpose=purpose)
    return (words >> 8).float() * 2.0**-24


def bits(shape: tuple[int, ...], *, seed: int, step: int, example: int | torch.Tensor, purpose: int) -> torch.Tensor:
    """Draw 32-bit words.

    Args:
        shape: Of one example's draw; at most 2**34 words.
        seed: In 0 .. 2**64 - 1.
        step: In 0 .. 2**32 - 1.
        example: In 0 .. 2**32 - 1; of a tensor of any shape, each element gets a draw of its own.
        purpose: In 0 .. 2**32 - 1.

    Returns:
        [*example.shape, *shape], int64 in 0 .. 2**32 - 1, on the device of `example`.

    Raises:
        TypeError: `seed`, `step`, `purpose` or `example` is not an integer.
        ValueError: One of them is out of its range (of `example`, only an int is checked).
    """
    return _draw(_blocks(shape, seed, step, example, purpose), shape)


def philox_4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Encrypt the counter with the key, in ten rounds.

    Args:
        counter: [..., 4], int64 in 0 .. 2**32 - 1.
        key: [..., 2], int64 in 0 .. 2**32 - 1.

    Returns:
        [..., 4], int64 in 0 .. 2**32 - 1.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD, (k1 + KEY_INCREMENTS[1]) & WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the high and the low word of a product of two words."""
    # in halves of b: the whole product may reach 2**64, and int64 ends at 2**63
    low_product = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low_product >> 16)
    return middle >> 16, (middle << 16 | low_product & 0xFFFF) & WORD


def _blocks(shape: tuple[int, ...], seed: int, step: int, example: int | torch.Tensor, purpose: int) -> torch.Tensor:
    """Return the blocks that a draw needs, [*example.shape, num_blocks, 4]."""
    validation.random_draw(seed, step, example, purpose)
    examples = torch.as_tensor(example)[..., None]
    block = torch.arange(-(-math.prod(shape) // 4), device=examples.device)
    steps, purposes = torch.full_like(block, step), torch.full_like(block, purpose)
    counter = torch.stack(torch.broadcast_tensors(block, steps, examples, purposes), dim=-1)
    # filled on the device: what is made of a list is copied there, and the host waits for it
    key = torch.stack([torch.full((), word, device=examples.device) for word in (seed & WORD, seed >> 32)])
    return philox_4x32(counter, key)


def _draw(blocks: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Cut blocks, [..., num_blocks, 4], to a draw, [..., *shape]."""
    return blocks.flatten(-2)[..., : math.prod(shape)].reshape((*blocks.shape[:-2], *shape))
