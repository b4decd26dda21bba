"""Kernels that tests/test_codegen.py compiles in a process without the interpreter."""

from functools import partial

import torch
import triton
import triton.language as tl

from gaugeblock.conformance.codegen.launches import LAUNCHES


@triton.jit
def matmul_kernel(a, b, c, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, depth, DEPTH):
        step = first + tl.arange(0, DEPTH)
        x = tl.load(a + row * depth + step[None, :])
        y = tl.load(b + step[:, None] * COLUMNS + column)
        total = tl.dot(x, y, total, input_precision="ieee")
    tl.store(c + row * COLUMNS + column, total)


@triton.autotune(configs=[triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 256})], key=["size"])
@triton.jit
def autotuned_kernel(source, target, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit
def hoarding_kernel(source, target, BLOCK: tl.constexpr):
    """Holds all of a block before it stores any: at least 512 registers in each thread of a warp."""
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index))


@triton.jit
def cosine_kernel(source, target):
    """Has an array on its stack, from libdevice, but no spills."""
    index = tl.arange(0, 32)
    tl.store(target + index, tl.cos(tl.load(source + index)))


@triton.jit
def wrong_kernel(source):
    tl.store(source, undefined_name)  # noqa: F821


def matmul(dtype: torch.dtype, *, rows: int = 64, step: int = 64, depth: int = 512, **options: int) -> None:
    a, b = torch.empty(rows, depth, dtype=dtype), torch.empty(depth, 64, dtype=dtype)
    matmul_kernel[(1,)](a, b, torch.empty(rows, 64), depth, ROWS=rows, COLUMNS=64, DEPTH=step, **options)


def autotuned() -> None:
    source, target = torch.empty(2, 1000)
    autotuned_kernel[lambda config: (triton.cdiv(1000, config["BLOCK"]),)](source, target, 1000)


def cosine() -> None:
    source, target = torch.empty(2, 32, dtype=torch.float64)
    cosine_kernel[(1,)](source, target, num_warps=1)


GOOD = [
    ("bfloat16", partial(matmul, torch.bfloat16)),
    ("bfloat16 again", partial(matmul, torch.bfloat16)),
    ("bfloat16 unaligned", partial(matmul, torch.bfloat16, depth=500)),
    ("float16 few rows", partial(matmul, torch.float16, rows=16)),
    ("float32", partial(matmul, torch.float32, rows=16, step=16)),
    ("autotuned", autotuned),
    ("cosine", cosine),
]
BAD = [
    ("too much shared memory", partial(matmul, torch.bfloat16, step=256, num_stages=4)),
    ("spilling", lambda: hoarding_kernel[(1,)](torch.empty(1), torch.empty(1), 2**15, num_warps=1)),
    ("two warps", partial(matmul, torch.float16, num_warps=2)),
    ("two warps of e4m3", partial(matmul, torch.float8_e4m3fn, num_warps=2)),
    ("wrong", lambda: wrong_kernel[(1,)](torch.empty(1))),
    ("raising", lambda: torch.empty(1).view(2)),
    ("empty", lambda: None),
]
MANY_TILES = [each for each in LAUNCHES if each[0] == "experts.fused_swiglu largest landmark, contiguous, bfloat16"]
NOTHING: list = []
