"""Small Triton kernels, each for one feature or one mistake, that tests of the interpreter run."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels, tl.sum too, are decorated


import torch
import triton
import triton.language as tl


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def interior(size: int) -> torch.Tensor:
    """A view with memory that belongs to no argument on both sides, as the gate's guarded buffers have."""
    return floats(size + 128)[64:-64]


@triton.jit
def copy_kernel(source, target, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + index, mask=index < size)
    tl.store(target + index, value.to(target.dtype.element_ty), mask=index < size)


@triton.jit
def cut_off_kernel(source, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty, fp_downcast_rounding="rtz"))


@triton.jit
def forgetful_kernel(source, target, size, BLOCK: tl.constexpr):
    """Stores lanes that were masked without `other`."""
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < size))


@triton.jit
def careful_kernel(source, target, size, BLOCK: tl.constexpr):
    """Masks without `other` as well, but never uses those lanes."""
    index = tl.arange(0, BLOCK)
    value = tl.load(source + index, mask=index < size)
    tl.store(target, tl.sum(tl.where(index < size, value, 0.0)))


@triton.jit
def arithmetic_kernel(a, b, target, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x, y = tl.load(a + index), tl.load(b + index)
    if OPERATION == "add":
        result = x + y
    elif OPERATION == "multiply":
        result = x * y
    elif OPERATION == "larger":
        result = tl.where(x > y, x, y)
    elif OPERATION == "maximum":
        result = tl.maximum(x, y)
    elif OPERATION == "fuse":
        result = tl.fma(x, y, x)
    else:
        result = -x - y
    tl.store(target + index, result)


@triton.jit
def add_kernel(a, b, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(a + index) + tl.load(b + index))


@triton.jit
def sum_kernel(source, target, BLOCK: tl.constexpr):
    tl.store(target, tl.sum(tl.load(source + tl.arange(0, BLOCK))))


@triton.jit
def dot_kernel(a, b, target, K: tl.constexpr, PRECISION: tl.constexpr):
    row, inner = tl.arange(0, 32), tl.arange(0, K)
    x = tl.load(a + row[:, None] * K + inner[None, :])
    y = tl.load(b + inner[:, None] * 32 + row[None, :])
    product = tl.dot(x, y) if PRECISION is None else tl.dot(x, y, input_precision=PRECISION)
    tl.store(target + row[:, None] * 32 + row[None, :], product)


@triton.jit
def atomic_add_kernel(target, index, value, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(target + tl.load(index + lane), tl.load(value + lane))


@triton.jit
def argmax_kernel(source, target, COLUMNS: tl.constexpr, TIE_BREAK_LEFT: tl.constexpr):
    row, column = tl.arange(0, 4), tl.arange(0, COLUMNS)
    values = tl.load(source + row[:, None] * COLUMNS + column[None, :])
    tl.store(target + row, tl.argmax(values, axis=1, tie_break_left=TIE_BREAK_LEFT))


@triton.jit
def ticket_kernel(counter, order):
    tl.store(order + tl.atomic_add(counter, 1), tl.program_id(0) * 2 + tl.program_id(1))


@triton.jit
def square_kernel(source, target, FACTOR):
    tl.store(target, tl.load(source + FACTOR * FACTOR))


@triton.jit
def wide_range_kernel(target, start, factor):
    for row in range(tl.load(start), tl.load(start) + 1):
        tl.store(target, row * factor)


@triton.jit
def to_int_kernel(source, target, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(target + lane, tl.load(source + lane).to(tl.int32))


@triton.jit
def assembly_kernel(target):
    value = tl.load(target)
    tl.store(target, value + 1)
    tl.store(target, tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], tl.float32, True, 1))


@triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["size"])
@triton.jit
def two_configs_kernel(source, target, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit
def descriptor_kernel(descriptor, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, descriptor.load([0]))


@triton.jit
def gathering_kernel(source, rows, target, ROWS: tl.constexpr, COUNT: tl.constexpr):
    descriptor = tl.make_tensor_descriptor(source, shape=[ROWS, 16], strides=[16, 1], block_shape=[1, 16])
    gathered = descriptor.gather(tl.load(rows + tl.arange(0, COUNT)), 0)
    tl.store(target + tl.arange(0, COUNT)[:, None] * 16 + tl.arange(0, 16)[None, :], gathered)


@triton.jit
def pointer_table_kernel(table, target):
    source = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(target, tl.load(source))


@triton.jit
def overlapping_kernel(target, value, STEP: tl.constexpr, ATOMIC: tl.constexpr):
    """Each program writes two rows of four, the second of which is the next program's first."""
    lane = tl.arange(0, 8)
    if ATOMIC:
        tl.atomic_add(target + tl.program_id(0) * STEP + lane, value)
    else:
        tl.store(target + tl.program_id(0) * STEP + lane, value)


@triton.jit
def two_targets_kernel(first, second):
    """Even programs write one tensor, odd ones the other."""
    target = first
    if tl.program_id(0) == 1:
        target = second
    tl.store(target + tl.arange(0, 8), 1.0)


@triton.jit
def neighbour_kernel(values):
    """Reads what the program before has written, or will write."""
    program = tl.program_id(0)
    tl.store(values + program + 1, tl.load(values + program) + 1)


@triton.jit
def barrier_kernel(counter):
    """No program goes on before all are there; with a branch before, a group of them waits for the others."""
    if tl.program_id(0) % 2 == 0:
        tl.atomic_add(counter, 1)
    else:
        tl.atomic_add(counter, 1)
    while tl.atomic_add(counter, 0) < 4:
        pass
