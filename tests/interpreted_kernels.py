"""Kernels, one for each feature of Triton's language, that tests/test_interpreter.py runs in two interpreters."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

PROGRAMS = 24


@dataclass
class Example:
    """A launch.

    Attributes:
        kernel: What is launched.
        arguments: Its tensors, which are copied before each launch.
        grid: Its programs.
        tolerance: How far two interpreters may differ where one computes in float64; 0 for the same bits.
        constants: Its keyword arguments.
    """

    kernel: Any
    arguments: tuple[torch.Tensor, ...]
    grid: Any = (PROGRAMS,)
    tolerance: float = 0.0
    constants: dict[str, Any] = field(default_factory=dict)

    def run(self) -> list[torch.Tensor]:
        """The tensors after a launch."""
        tensors = [each.clone() for each in self.arguments]
        self.kernel[self.grid](*tensors, **self.constants)
        return tensors


EXAMPLES: dict[str, Example] = {}


def example(*arguments: torch.Tensor, **options: Any) -> Callable[[Any], Any]:
    """Registers a kernel under its name."""

    def register(kernel: Any) -> Any:
        EXAMPLES[kernel.fn.__name__] = Example(kernel, arguments, **options)
        return kernel

    return register


_generator = torch.Generator().manual_seed(0)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator)


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=_generator).to(torch.int32)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


@example(floats(PROGRAMS, 16), integers(0, 5, PROGRAMS))
@triton.jit
def in_place_then_diverge(values, counts):
    program, lanes = tl.program_id(0), tl.arange(0, 16)
    pointers = values + program * 16 + lanes
    tl.store(pointers, tl.load(pointers) * 2 + 1)
    for turn in range(tl.load(counts + program)):
        tl.store(pointers, tl.load(pointers) * 2 + turn)


@example(zeros(4, dtype=torch.int32), zeros(PROGRAMS, dtype=torch.int32), integers(0, 3, PROGRAMS))
@triton.jit
def atomics_then_diverge(counters, out, choices):
    program = tl.program_id(0)
    old = tl.atomic_add(counters, 1)
    if tl.load(choices + program) == 1:
        tl.atomic_max(counters + 1, program)
    tl.atomic_add(counters + 2, tl.load(choices + program))
    tl.store(out + program, old * 0 + 1)


@example(zeros(64), floats(PROGRAMS, 64))
@triton.jit
def atomics_of_blocks(out, values):
    lanes = tl.arange(0, 64)
    tl.atomic_add(out + lanes, tl.load(values + tl.program_id(0) * 64 + lanes), mask=lanes < 60)


@example(zeros(PROGRAMS, dtype=torch.int32), integers(1, 200, PROGRAMS))
@triton.jit
def while_with_many_trip_counts(out, starts):
    program = tl.program_id(0)
    value, steps = tl.load(starts + program), 0
    while value != 1:
        value = value // 2 if value % 2 == 0 else 3 * value + 1
        steps += 1
    tl.store(out + program, steps)


@triton.jit
def _sum_or_difference(x, y, ADD: tl.constexpr):
    if ADD:
        return x + y
    return x - y


@example(zeros(PROGRAMS, 8), floats(PROGRAMS, 8))
@triton.jit
def static_range_and_device_functions(out, values):
    program, lanes = tl.program_id(0), tl.arange(0, 8)
    total = tl.zeros([8], tl.float32)
    for turn in tl.static_range(4):
        total = _sum_or_difference(total, tl.load(values + program * 8 + lanes) * turn, turn % 2 == 0)
    for turn in tl.range(0, 3, num_stages=2):
        total += turn
    if program == 3 or (program > 5 and program < 9):
        total += 100
    total = total * 2 if program % 2 == 0 else total * 3
    tl.store(out + program * 8 + lanes, total)


@example(zeros(37, 8), floats(37, 8))
@triton.jit
def persistent_loop(out, values):
    lanes = tl.arange(0, 8)
    for row in range(tl.program_id(0), 37, tl.num_programs(0)):
        tl.store(out + row * 8 + lanes, tl.load(values + row * 8 + lanes) * row)


@example(zeros(PROGRAMS, dtype=torch.int64), integers(0, 9, PROGRAMS).long())
@triton.jit
def descending_range(out, starts):
    program = tl.program_id(0)
    start, total = tl.load(starts + program), tl.load(starts) * 0
    for value in range(start, start - 5, -2):
        total += value
    tl.store(out + program, total)


@example(zeros(PROGRAMS, 16), zeros(PROGRAMS, 16), zeros(PROGRAMS, 4), zeros(PROGRAMS, 16), floats(PROGRAMS, 16))
@triton.jit
def sort_topk_flip(ascending, descending, best, flipped, values):
    program, lanes = tl.program_id(0), tl.arange(0, 16)
    row = tl.load(values + program * 16 + lanes)
    tl.store(ascending + program * 16 + lanes, tl.sort(row))
    tl.store(descending + program * 16 + lanes, tl.sort(row, descending=True))
    tl.store(best + program * 4 + tl.arange(0, 4), tl.topk(row, 4))
    tl.store(flipped + program * 16 + lanes, tl.flip(row))


@triton.jit
def _compose(scale, shift, next_scale, next_shift):
    return scale * next_scale, shift * next_scale + next_shift


@triton.jit
def _larger_magnitude(x, y):
    return tl.where(tl.abs(x) > tl.abs(y), x, y)


@example(*(zeros(PROGRAMS, 4, 16) for _ in range(2)), zeros(PROGRAMS, 4), zeros(PROGRAMS), (floats(PROGRAMS, 4, 16) * 2).round())
@triton.jit
def scans_and_reductions(sums, products, extremes, totals, values):
    program = tl.program_id(0)
    lanes = tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :]
    block = tl.load(values + program * 64 + lanes)
    tl.store(sums + program * 64 + lanes, tl.cumsum(block, 1))
    tl.store(products + program * 64 + lanes, tl.cumprod(block, 0, reverse=True))
    tl.store(extremes + program * 4 + tl.arange(0, 4), tl.reduce(block, 1, _larger_magnitude))
    tl.store(totals + program, tl.reduce(block, None, _larger_magnitude) + tl.sum(block))


@example(zeros(PROGRAMS, 16), integers(-2, 3, PROGRAMS, 16).float())
@triton.jit
def scan_of_pairs(out, values):
    program, lanes = tl.program_id(0), tl.arange(0, 16)
    row = tl.load(values + program * 16 + lanes)
    _, shifts = tl.associative_scan((row, row + 1), 0, _compose)
    tl.store(out + program * 16 + lanes, shifts)


@example(
    zeros(PROGRAMS, 4, dtype=torch.int32), zeros(PROGRAMS, 4), zeros(PROGRAMS, 4, dtype=torch.int32), zeros(PROGRAMS, 1, 16),
    floats(PROGRAMS, 4, 16).round() + 0.0,
)  # fmt: skip
@triton.jit
def ties_of_argmax(where, highest, where_lowest, lowest, values):
    program, rows = tl.program_id(0), tl.arange(0, 4)
    lanes = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    block = tl.load(values + program * 64 + lanes)
    maximum, index = tl.max(block, axis=1, return_indices=True)
    tl.store(where + program * 4 + rows, index)
    tl.store(highest + program * 4 + rows, maximum)
    tl.store(where_lowest + program * 4 + rows, tl.argmin(block, axis=1))
    tl.store(lowest + program * 16 + tl.arange(0, 16)[None, :], tl.min(block, axis=0, keep_dims=True))


@example(
    zeros(PROGRAMS, 8, dtype=torch.int32), zeros(PROGRAMS, 16), zeros(PROGRAMS, 32), zeros(PROGRAMS, 16), zeros(PROGRAMS, 8),
    zeros(PROGRAMS, 16), integers(0, 16, PROGRAMS, 16), floats(PROGRAMS, 16),
)  # fmt: skip
@triton.jit
def moves_of_elements(counts, gathered, joined, transposed, differences, interleaved, index, values):
    program, lanes = tl.program_id(0), tl.arange(0, 16)
    row, where = tl.load(values + program * 16 + lanes), tl.load(index + program * 16 + lanes)
    tl.store(counts + program * 8 + tl.arange(0, 8), tl.histogram(where % 8, 8))
    tl.store(gathered + program * 16 + lanes, tl.gather(row, where, 0))
    tl.store(joined + program * 32 + tl.arange(0, 32), tl.cat(row, row + 1, can_reorder=True))
    matrix = row.reshape([2, 8])
    tl.store(transposed + program * 16 + lanes, tl.trans(matrix).reshape([16]) + matrix.T.reshape([16]))
    even, odd = tl.split(row.reshape([8, 2]))
    tl.store(differences + program * 8 + tl.arange(0, 8), even - odd)
    both = tl.interleave(even, odd) + tl.join(even, odd).reshape([16]) + tl.permute(matrix, (1, 0)).reshape([16])
    tl.store(interleaved + program * 16 + lanes, both)


@example(zeros(PROGRAMS, 16), zeros(PROGRAMS, 16), zeros(PROGRAMS, 16, dtype=torch.int32), tolerance=1e-6)
@triton.jit
def random_numbers(uniform, normal, bits):
    program, lanes = tl.program_id(0), tl.arange(0, 16)
    tl.store(uniform + program * 16 + lanes, tl.rand(42, program * 16 + lanes))
    tl.store(normal + program * 16 + lanes, tl.randn(program, lanes))
    tl.store(bits + program * 16 + lanes, tl.randint(7, lanes + program))


@example(zeros(PROGRAMS, 16, 32), floats(PROGRAMS * 16, 32), constants={"ROWS": PROGRAMS * 16})
@triton.jit
def descriptors(out, values, ROWS: tl.constexpr):
    program = tl.program_id(0)
    source = tl.make_tensor_descriptor(values, shape=[ROWS, 32], strides=[32, 1], block_shape=[16, 16])
    target = tl.make_tensor_descriptor(out + program * 512, shape=[16, 32], strides=[32, 1], block_shape=[16, 16])
    for half in range(2):
        target.store([0, half * 16], source.load([program * 16, half * 16]) * 2)


@example(zeros(PROGRAMS), floats(PROGRAMS))
@triton.jit
def messages(out, values):
    program = tl.program_id(0)
    value = tl.load(values + program)
    tl.device_assert(value < 100, "large")
    tl.debug_barrier()
    tl.static_assert(out.dtype.element_ty == tl.float32)
    tl.assume(program >= 0)
    if program == 2:
        tl.device_print("value", value)
    tl.store(out + program, value)


@example(zeros(PROGRAMS, 16), zeros(PROGRAMS), floats(PROGRAMS, 16), integers(1, 16, PROGRAMS), tolerance=1e-6)
@triton.jit
def scalars_and_masks(out, functions, values, counts):
    program, lanes = tl.program_id(0), tl.arange(0, 16)
    count = tl.load(counts + program)
    row = tl.load(values + program * 16 + lanes, mask=lanes < count)
    row = tl.where(lanes < count, row, tl.cdiv(count, 3).to(tl.float32))
    tl.store(out + program * 16 + lanes, row + -7 // count + -7 % count + min(count, 4) + max(program, 3), mask=lanes <= count)
    two = tl.full((), 2.0, tl.float32)
    tl.store(functions + program, two * count + tl.exp(two) + tl.sigmoid(tl.load(values + program)) + tl.math.erf(two))


@example(zeros(PROGRAMS), torch.arange(PROGRAMS, dtype=torch.float32), integers(0, 2, PROGRAMS))
@triton.jit
def pointers_as_integers(out, values, choices):
    program = tl.program_id(0)
    pointer = values + program
    if tl.load(choices + program) == 0:
        pointer = values
    address = pointer.to(tl.int64)
    tl.store(out + program, tl.load(address.to(tl.pointer_type(tl.float32))) + 1)


@example(zeros(16), floats(16), floats(16), grid=(1,))
@triton.jit
def lanes_of_several_tensors(out, left, right):
    lanes = tl.arange(0, 16)
    tl.store(out + lanes, tl.load(tl.where(lanes % 2 == 0, left + lanes, right + lanes)))


@example(zeros(5, 3, 4, 16, 16), floats(5, 16, 32).half(), floats(3, 32, 16).half(), grid=(5, 3, 4), tolerance=1e-6)
@triton.jit
def dots_in_a_grid_of_three_axes(out, left, right):
    i, j, k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, columns, inner = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :], tl.arange(0, 32)
    a = tl.load(left + i * 512 + rows * 32 + inner[None, :])
    b = tl.load(right + j * 512 + inner[:, None] * 16 + columns)
    tl.store(out + ((i * 3 + j) * 4 + k) * 256 + rows * 16 + columns, tl.dot(a, b) * k)


@example(
    zeros(16, 16, dtype=torch.int32), integers(-9, 9, 16, 32).to(torch.int8), integers(-9, 9, 32, 16).to(torch.int8), grid=(1,)
)  # fmt: skip
@triton.jit
def dot_of_integers(out, left, right):
    rows, columns, inner = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :], tl.arange(0, 32)
    a, b = tl.load(left + rows * 32 + inner[None, :]), tl.load(right + inner[:, None] * 16 + columns)
    tl.store(out + rows * 16 + columns, tl.dot(a, b, out_dtype=tl.int32))


@example(zeros(PROGRAMS, dtype=torch.int32), zeros(1, dtype=torch.int32), zeros(1, dtype=torch.int32))
@triton.jit
def spin_lock(out, lock, count):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    old = tl.load(count)
    tl.store(count, old + 1)
    tl.store(out + tl.program_id(0), old)
    tl.atomic_xchg(lock, 0)


@example(zeros(PROGRAMS, 8), floats(PROGRAMS, 8), integers(0, 4, PROGRAMS))
@triton.jit
def break_and_return_in_loops(out, values, counts):
    program, lanes = tl.program_id(0), tl.arange(0, 8)
    total = tl.zeros([8], tl.float32)
    for turn in range(4):
        if turn > tl.load(counts + program):
            break
        total += tl.load(values + program * 8 + lanes)
    if tl.max(total, 0) < 0.5:
        return
    tl.store(out + program * 8 + lanes, total)


@example(zeros(PROGRAMS, 8), floats(PROGRAMS, 8), grid=lambda meta: (PROGRAMS * meta["BLOCK"] // 8,), constants={"BLOCK": 8})
@triton.jit
def bits_and_a_grid_from_constants(out, values, BLOCK: tl.constexpr):
    program, lanes = tl.program_id(0), tl.arange(0, BLOCK)
    row = tl.load(values + program * BLOCK + lanes)
    bits = row.to(tl.uint32, bitcast=True)
    high = tl.umulhi(bits, bits ^ 0x9E3779B9)
    mixed = ((high >> 3) | (bits << 2)) & 0x3FFFFFFF
    tl.store(out + program * BLOCK + lanes, mixed.to(tl.float32, bitcast=True) + tl.clamp(row, -1.0, 1.0))


@example(zeros(PROGRAMS, 16), floats(PROGRAMS, 16).to(torch.float8_e5m2), floats(PROGRAMS, 16).to(torch.float8_e4m3fn))
@triton.jit
def loads_of_float8(out, wide, fine):
    lanes = tl.program_id(0) * 16 + tl.arange(0, 16)
    tl.store(out + lanes, tl.load(wide + lanes).to(tl.float32) + tl.load(fine + lanes).to(tl.float32))
