"""Philox 4x32-10 in Triton: the words and normals of `gaugeblock.reference.torch.random`, bit for bit.

`philox_block` and `box_muller` are for use inside other kernels, which then read no random numbers from
memory. Bound by the arithmetic: four words cost 20 wide multiplications, and four normals two logarithms and
two pairs of sine and cosine in float64 besides.
"""

import math

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.launch import device_of, require_triton_device
from gaugeblock.reference import validation

BLOCK_SIZE = 256  # Philox blocks of four numbers per program: two per thread of four warps
UNIT = tl.constexpr(2.0**-32)
TURN = tl.constexpr(2.0**-32 * 2 * math.pi)  # a power of two commutes with rounding: the reference's angle


@triton.jit
def philox_block(block, seed, step, example, purpose):
    """Return the four words of a block of a draw, uint32; `block` is a tensor, all others may be scalars."""
    zero = block.to(tl.uint32) * 0
    return tl.philox(
        seed,
        block.to(tl.uint32),
        zero + tl.cast(step, tl.uint32),
        zero + tl.cast(example, tl.uint32),
        zero + tl.cast(purpose, tl.uint32),
    )


@triton.jit
def box_muller(word_0, word_1):
    """Return the two standard normals of two words, float32."""
    radius = tl.sqrt(-2 * tl.log((word_0.to(tl.float64) + 1) * UNIT))
    angle = word_1.to(tl.float64) * TURN
    return (radius * tl.cos(angle)).to(tl.float32), (radius * tl.sin(angle)).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "step", "purpose", "draw_size"])
def draw_kernel(out_ptr, example_ptr, seed, step, purpose, draw_size, NORMAL: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Write the draw of one example: out [num_examples, draw_size], example [num_examples]."""
    programs_per_row = tl.cdiv(draw_size, 4 * BLOCK_SIZE)
    row = tl.program_id(0) // programs_per_row
    block = (tl.program_id(0) % programs_per_row).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x0, x1, x2, x3 = philox_block(block, seed, step, tl.load(example_ptr + row), purpose)
    if NORMAL:
        x0, x1 = box_muller(x0, x1)
        x2, x3 = box_muller(x2, x3)
    column = block * 4
    out_ptr += row.to(tl.int64) * draw_size + column
    tl.store(out_ptr, x0, mask=column < draw_size)
    tl.store(out_ptr + 1, x1, mask=column + 1 < draw_size)
    tl.store(out_ptr + 2, x2, mask=column + 2 < draw_size)
    tl.store(out_ptr + 3, x3, mask=column + 3 < draw_size)


def normal(shape: tuple[int, ...], *, seed: int, step: int, example: torch.Tensor, purpose: int) -> torch.Tensor:
    """Draw standard normals, [*example.shape, *shape], float32: `reference.torch.random.normal`."""
    return _draw(torch.float32, shape, seed, step, example, purpose)


def bits(shape: tuple[int, ...], *, seed: int, step: int, example: torch.Tensor, purpose: int) -> torch.Tensor:
    """Draw 32-bit words, [*example.shape, *shape], int64: `reference.torch.random.bits`."""
    return _draw(torch.int64, shape, seed, step, example, purpose)


def _draw(dtype: torch.dtype, shape: tuple[int, ...], seed: int, step: int, example: torch.Tensor, purpose: int) -> torch.Tensor:
    validation.random_draw(seed, step, example, purpose)
    require_triton_device("example", example)
    out = torch.empty(*example.shape, *shape, dtype=dtype, device=example.device)
    if out.numel() == 0:
        return out
    draw_size = math.prod(shape)
    draw = draw_kernel[(example.numel() * triton.cdiv(draw_size, 4 * BLOCK_SIZE),)]
    with device_of(example):
        draw(out, example.contiguous(), seed, step, purpose, draw_size, dtype == torch.float32, BLOCK_SIZE)
    return out
