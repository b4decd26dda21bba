"""Our interpreter of Triton kernels: results as of Triton's own, right where that is wrong, and what it finds by the way."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels, tl.sum too, are decorated

import subprocess
import sys
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import driver
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gaugeblock.conformance.engine.triton.interpreter import OutOfBoundsAccess, control_flow, watch
from tests.interpreted_kernels import EXAMPLES, PROGRAMS

# Triton 3.6 cannot sort in an interpreter: its `tl.sort` compares None.
RUNNABLE = [name for name in EXAMPLES if name != "sort_topk_flip" or not triton.__version__.startswith("3.6.")]


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
def tanh_kernel(target):
    tl.store(target, libdevice.tanh(tl.load(target)))


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


class TestFeatures:
    @pytest.mark.parametrize("name", RUNNABLE)
    def test_results_are_those_of_triton_s_own_interpreter(self, name):
        example = EXAMPLES[name]
        expected = example.run()
        with watch() as seen:
            results = example.run()
        assert seen.launches == Counter({name: 1}) and not seen.unbatched and not seen.races
        for mine, theirs in zip(results, expected, strict=True):
            if example.tolerance:
                assert (mine - theirs).abs().max() <= example.tolerance * theirs.abs().max()
            else:
                assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))

    @pytest.mark.parametrize("name", RUNNABLE)
    def test_order_of_the_programs_changes_nothing(self, name):
        if name in ("atomics_of_blocks", "spin_lock"):
            pytest.skip("its programs depend on their order")
        with watch():
            expected = EXAMPLES[name].run()
        for seed in range(3):
            with watch(order=seed):
                assert all(map(torch.equal, EXAMPLES[name].run(), expected))

    def test_printed_lines_name_the_program(self, capfd):
        with watch():
            EXAMPLES["messages"].run()
        value = EXAMPLES["messages"].arguments[1][2].item()
        assert capfd.readouterr().out.split() == ["(2,", "0,", "0)", "value:", f"{value:.8f}"]

    def test_argmax_takes_the_first_of_ties(self):
        source = torch.tensor([[0.0, 2, 2, 1], [3, 3, 3, 3], [0, 0, 0, 1], [-1, -2, -1, -3]])
        target = torch.empty(4, dtype=torch.int32)
        with watch():
            argmax_kernel[(1,)](source, target, 4, True)
        assert target.tolist() == [1, 0, 3, 0]

    def test_argmax_of_nothing_but_nan_is_the_first(self):
        source, target = torch.full((4, 4), torch.nan), torch.empty(4, dtype=torch.int32)
        source[1, 2] = 1
        with watch():
            argmax_kernel[(1,)](source, target, 4, True)
        assert target.tolist() == [0, 2, 0, 0]

    def test_32_bit_offsets_wrap_as_on_a_gpu(self):
        with watch(), pytest.raises(OutOfBoundsAccess):
            square_kernel[(1,)](torch.ones(4), torch.zeros(1), 46341)

    def test_a_loop_s_variable_has_the_dtype_of_its_bounds(self):
        target = torch.zeros(1, dtype=torch.int64)
        with watch():
            wide_range_kernel[(1,)](target, torch.tensor([70_000]), 70_000)
        assert target.item() == 70_000**2

    def test_autotune_takes_the_first_of_its_configurations(self):
        source, target = floats(100), torch.empty(100)
        active = driver._active
        with watch() as seen:
            two_configs_kernel[lambda config: (triton.cdiv(100, config["BLOCK"]),)](source, target, 100)
        assert torch.equal(source, target) and seen.launches == Counter(two_configs_kernel=1)
        assert driver._active is active

    def test_programs_that_wait_for_each_other_end_with_an_error(self, monkeypatch):
        monkeypatch.setattr(control_flow, "MOST_QUESTIONS", 100)
        with watch(), pytest.raises(control_flow.WaitsForever, match=r"barrier_kernel, program \(\d, 0, 0\): a loop still turns"):
            barrier_kernel[(4,)](torch.zeros(1, dtype=torch.int32))


class TestArithmetic:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("operation", "function"),
        [
            ("add", torch.add),
            ("multiply", torch.mul),
            ("larger", torch.maximum),
            ("maximum", torch.maximum),
            ("fuse", lambda x, y: (x.double() * y.double() + x.double()).to(x.dtype)),
            ("negative", lambda x, y: -x - y),
        ],
    )
    def test_numbers_of_16_bits_are_rounded_after_each_operation(self, operation, function, dtype):
        a, b = floats(2, 1024, dtype=dtype)
        target = torch.empty(1024, dtype=dtype)
        with watch():
            arithmetic_kernel[(1,)](a, b, target, operation, 1024)
        assert torch.equal(target, function(a, b))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
    def test_casts_round_to_nearest_even(self, dtype):
        edges = torch.tensor([0.0, -0.0, 1.0625, -1.1875, 2**-9, 3 * 2**-10, 2**-10, 1 + 2**-8, 1 + 3 * 2**-8, 2**-17])
        source = torch.cat([edges, 50 * floats(2038), floats(2048) / 1000])
        target, wide = torch.empty(4096, dtype=dtype), torch.empty(4096)
        with watch():
            copy_kernel[(2,)](source, target, 4096, 2048)
            copy_kernel[(2,)](target, wide, 4096, 2048)
        assert torch.equal(target.view(torch.uint8), source.to(dtype).view(torch.uint8))
        assert torch.equal(wide, source.to(dtype).float())

    def test_float64_is_rounded_once(self):
        source = torch.tensor([1 + 2**-8 + 2**-40, 1 + 2**-8, -(1 + 2**-8) - 2**-40, 2.0], dtype=torch.float64)
        target = torch.empty(4, dtype=torch.bfloat16)
        with watch():
            copy_kernel[(1,)](source, target, 4, 4)
        assert target.tolist() == [1 + 2**-7, 1, -1 - 2**-7, 2]

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_what_is_too_large_for_8_bits_becomes_the_largest(self, dtype):
        source = torch.tensor([1e9, -1e9, torch.inf, torch.nan])
        target = torch.empty(4, dtype=dtype)
        with watch():
            copy_kernel[(1,)](source, target, 4, 4)
        largest = torch.finfo(dtype).max
        assert target.float()[:3].tolist() == [largest, -largest, largest] and target.float()[3].isnan()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_casts_cut_off_where_asked(self, dtype):
        source, target = floats(256), torch.empty(256, dtype=dtype)
        with watch():
            cut_off_kernel[(1,)](source, target, 256)
        assert (target.float().abs() <= source.abs()).all()
        assert torch.allclose(target.float(), source, rtol=2**-7)  # bfloat16's distance between neighbours: what is cut off

    def test_numbers_that_fit_no_integer_become_the_nearest(self):
        source = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e9, -3e9, -2.9, 2.9, 2147483520.0])
        target = torch.empty(8, dtype=torch.int32)
        with watch():
            to_int_kernel[(1,)](source, target, 8)
        highest = 2**31 - 1
        assert target.tolist() == [0, highest, -highest - 1, highest, -highest - 1, -2, 2, 2147483520]

    def test_sums_of_bfloat16_are_rounded_after_each_addition(self):
        target = torch.empty(1, dtype=torch.bfloat16)
        with watch():
            sum_kernel[(1,)](torch.tensor([256.0, 1, 0, 0]).bfloat16(), target, 4)
        assert target.item() == 256

    def test_bfloat16_atomics_add_every_lane_in_the_order_of_the_programs(self):
        values = floats(64, dtype=torch.bfloat16)
        index, target = torch.arange(64, dtype=torch.int32) % 4, torch.zeros(4, dtype=torch.bfloat16)
        with watch() as seen:
            atomic_add_kernel[(4,)](target, index, values, 16)
        expected = torch.zeros(4, dtype=torch.bfloat16)
        for row in values.view(16, 4):
            expected += row
        assert torch.equal(target, expected) and not seen.unbatched

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int64])
    def test_atomics_add_every_lane(self, dtype):
        index, target = torch.arange(64, dtype=torch.int32) % 4, torch.zeros(4, dtype=dtype)
        with watch():
            atomic_add_kernel[(2,)](target, index, torch.ones(64, dtype=dtype), 32)
        assert target.eq(16).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
    def test_dots_are_summed_exactly_and_rounded_once(self, dtype):
        a, b = floats(2, 32, 32).to(dtype)
        target = torch.empty(32, 32)
        with watch():
            dot_kernel[(1,)](a, b, target, 32, "ieee")
        assert torch.equal(target, (a.double() @ b.double()).float())

    @pytest.mark.parametrize(("precision", "error"), [(None, 2**-10), ("tf32", 2**-10), ("tf32x3", 2**-19), ("ieee", 2**-23)])
    def test_dots_of_float32_are_as_precise_as_asked(self, precision, error):
        a, b = floats(2, 32, 32)
        target = torch.empty(32, 32)
        with watch():
            dot_kernel[(1,)](a, b, target, 32, precision)
        exact, scale = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        worst = ((target - exact).abs() / scale).max().item()
        assert (0 if precision == "ieee" else error / 64) < worst < error

    def test_tf32_rounds_to_nearest_even_of_ten_bits(self):
        a, target = torch.zeros(32, 32), torch.empty(32, 32)
        a[0, :4] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, torch.inf])
        with watch():
            dot_kernel[(1,)](a, torch.eye(32), target, 32, "tf32")
        assert target[0, :3].isnan().all()  # infinity times zero
        a[0, 3] = 0
        with watch():
            dot_kernel[(1,)](a, torch.eye(32), target, 32, "tf32")
        assert target[0, :3].tolist() == [1, 1 + 2**-9, 1 + 2**-10]


class TestMemory:
    def test_store_past_the_end_names_kernel_lanes_and_distance(self):
        expected = r"copy_kernel, program \(1, 0, 0\): 6 of 36 lanes .* 24 bytes past the end of target"
        with watch(), pytest.raises(OutOfBoundsAccess, match=expected):
            copy_kernel[(2,)](floats(100), interior(94), 100, 64)

    def test_unmasked_load_past_the_end_raises(self):
        expected = r"load in add_kernel.* 4 of 64 lanes .* 16 bytes past the end of b"
        with watch(), pytest.raises(OutOfBoundsAccess, match=expected):
            add_kernel[(1,)](floats(64), interior(60), torch.empty(64), 64)

    def test_access_before_the_start_raises(self):
        expected = "atomic in atomic_add_kernel.* 1 of 2 lanes .* 8 bytes before the start of target"
        with watch(), pytest.raises(OutOfBoundsAccess, match=expected):
            atomic_add_kernel[(1,)](interior(4), torch.tensor([-2, 0]), torch.ones(2), 2)

    def test_access_far_outside_raises_instead_of_killing_the_process(self):
        with watch(), pytest.raises(OutOfBoundsAccess):
            square_kernel[(1,)](torch.ones(4), torch.zeros(1), 30_000)

    def test_masked_load_past_the_end_counts_the_enabled_lanes(self):
        expected = r"load in copy_kernel, program \(1, 0, 0\): 10 of 36 lanes .* 40 bytes past the end of source"
        with watch(), pytest.raises(OutOfBoundsAccess, match=expected):
            copy_kernel[(2,)](interior(90), floats(100), 100, 64)

    def test_strided_view_may_be_accessed_over_its_whole_extent(self):
        with watch():
            square_kernel[(1,)](torch.ones(5, 4)[:, :2], torch.zeros(1), 4)

    def test_expanded_tensor_has_the_extent_of_one_element(self):
        with watch(), pytest.raises(OutOfBoundsAccess, match="63 of 64 lanes"):
            copy_kernel[(1,)](interior(1).expand(64), torch.empty(64), 64, 64)

    def test_empty_tensor_may_not_be_accessed(self):
        with watch(), pytest.raises(OutOfBoundsAccess):
            copy_kernel[(1,)](floats(4), torch.empty(0), 4, 64)

    def test_elements_that_lie_askew_are_read_as_they_are(self):
        source, target = torch.arange(65, dtype=torch.uint8), torch.empty(16, dtype=torch.int32)
        with watch():
            copy_kernel[(1,)](triton.reinterpret(source[1:], tl.int32), target, 16, 16)
        assert torch.equal(target.view(torch.uint8), source[1:])

    def test_tensor_descriptor_guards_its_base(self):
        source, target = floats(64), torch.empty(64)
        descriptor = TensorDescriptor(source, [64], [1], [64])
        with watch():
            descriptor_kernel[(1,)](descriptor, target, 64)
        assert torch.equal(source, target)
        too_long = TensorDescriptor(interior(48), [64], [1], [64])
        with watch(), pytest.raises(OutOfBoundsAccess, match=r"16 of 64 .* past the end of descriptor"):
            descriptor_kernel[(1,)](too_long, target, 64)

    def test_reinterpreted_tensor_is_guarded(self):
        source, target = torch.ones(64, dtype=torch.uint8), torch.empty(64, dtype=torch.uint8)
        with watch():
            copy_kernel[(1,)](triton.reinterpret(source, tl.int8), target, 64, 64)
        assert target.eq(1).all()

    def test_tensors_behind_a_pointer_table_must_be_declared(self):
        source, target = torch.full((1,), 3.0), torch.zeros(1)
        table = torch.tensor([source.data_ptr()])
        with watch(), pytest.raises(OutOfBoundsAccess):
            pointer_table_kernel[(1,)](table, target)
        with watch(reachable=[source]):
            pointer_table_kernel[(1,)](table, target)
        assert target.item() == 3

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.uint8])
    def test_masked_lanes_without_other_load_zero(self, dtype):
        source, target = torch.ones(40, dtype=dtype), torch.zeros(64, dtype=dtype)
        with watch():
            forgetful_kernel[(1,)](source, target, 40, 64)
        assert target[:40].float().eq(1).all() and target[40:].float().eq(0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    def test_poisoned_lanes_load_nan(self, dtype):
        source, target = torch.ones(40, dtype=dtype), torch.zeros(64, dtype=dtype)
        with watch(poison=True):
            forgetful_kernel[(1,)](source, target, 40, 64)
        assert target[:40].float().eq(1).all() and target[40:].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_poisoned_integer_lanes_are_large_negative_and_zero(self, dtype):
        source, target = torch.ones(40, dtype=dtype), torch.zeros(64, dtype=dtype)
        with watch(poison=True):
            forgetful_kernel[(1,)](source, target, 40, 64)
        large = torch.iinfo(dtype).max // 3
        assert set(target[40:].tolist()) == {large, torch.tensor(-large).to(dtype).item(), 0}

    def test_careful_kernels_do_not_see_the_poison(self):
        target = torch.empty(1)
        with watch(poison=True):
            careful_kernel[(1,)](floats(40), target, 40, 64)
        torch.testing.assert_close(target[0], floats(40).sum())


class TestRaces:
    def test_two_programs_that_write_one_element_are_named(self):
        with watch() as seen:
            overlapping_kernel[(3,)](torch.zeros(4, 4), 1.0, 4, False)
        assert seen.races == ["overlapping_kernel: programs (0, 0, 0) and (1, 0, 0) both write target[1, 0]"]

    def test_programs_apart_and_atomics_do_not_race(self):
        with watch() as seen:
            overlapping_kernel[(3,)](torch.zeros(24), 1.0, 8, False)
            overlapping_kernel[(3,)](torch.zeros(16), 1.0, 4, True)
        assert not seen.races

    def test_overlapping_views_are_one_tensor(self):
        buffer = torch.zeros(12)
        with watch() as seen:
            two_targets_kernel[(2,)](buffer[:8], buffer[4:])
        assert seen.races == ["two_targets_kernel: programs (0, 0, 0) and (1, 0, 0) both write second[0]"]

    def test_batches_of_a_launch_race_as_well(self):
        with watch(order=0) as seen:
            overlapping_kernel[(300,)](torch.zeros(1204), 1.0, 4, False)
        assert len(seen.races) == 1

    def test_reading_what_another_program_writes_shows_in_another_order(self):
        values = [torch.zeros(17) for _ in range(2)]
        with watch() as seen:
            neighbour_kernel[(16,)](values[0])
        with watch(order=0):
            neighbour_kernel[(16,)](values[1])
        assert not seen.races and not torch.equal(*values)


class TestOrder:
    def test_each_program_runs_once_in_an_order_of_the_seed(self):
        orders = torch.empty(3, 12, dtype=torch.int32)
        for order, seed in zip(orders, (0, 0, 1), strict=True):
            with watch(order=seed):
                ticket_kernel[(6, 2)](torch.zeros(1, dtype=torch.int32), order)
        assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
        assert orders.sort(dim=1).values.eq(torch.arange(12)).all()

    @pytest.mark.parametrize("seed", range(4))
    def test_two_programs_change_places(self, seed):
        order = torch.empty(2, dtype=torch.int32)
        with watch(order=seed):
            ticket_kernel[(1, 2)](torch.zeros(1, dtype=torch.int32), order)
        assert order.tolist() == [1, 0]


class TestFallback:
    def test_what_is_not_batched_runs_under_triton_s_own_interpreter(self):
        source, rows, target = floats(32, 16), torch.tensor([3, 1, 30, 7, 0, 5, 9, 2], dtype=torch.int32), torch.empty(8, 16)
        with watch() as seen:
            gathering_kernel[(1,)](source, rows, target, 32, 8)
        assert torch.equal(target, source[rows.long()])
        assert seen.unbatched == ["gathering_kernel: descriptor_gather"] and seen.launches == Counter(gathering_kernel=1)

    def test_what_was_written_before_is_undone(self):
        target = torch.ones(1)
        with watch() as seen, pytest.raises(InterpreterError, match="not supported in interpreter mode"):
            assembly_kernel[(1,)](target)
        assert target.item() == 2 and seen.unbatched == ["assembly_kernel: inline_asm"]  # written once again

    def test_it_is_guarded(self):
        rows = torch.zeros(8, dtype=torch.int32)
        with watch(), pytest.raises(OutOfBoundsAccess, match=r"store in gathering_kernel, program \(0, 0, 0\): 64 of 128 lanes"):
            gathering_kernel[(1,)](floats(32, 16), rows, torch.empty(4, 16), 32, 8)

    def test_libdevice_is_unsupported(self):
        with watch(), pytest.raises(InterpreterError):
            tanh_kernel[(1,)](floats(1))


class TestWatch:
    def test_counts_launches_per_kernel(self):
        with watch() as seen:
            copy_kernel[(2,)](floats(100), torch.empty(100), 100, 64)
            copy_kernel[(1,)](floats(8), torch.empty(8), 8, 64)
            add_kernel[(1,)](floats(64), floats(64), torch.empty(64), 64)
        assert seen.launches == Counter(copy_kernel=2, add_kernel=1)

    def test_error_leaves_the_process_usable(self):
        source, target = floats(64), torch.empty(64)
        with watch() as seen:
            with pytest.raises(OutOfBoundsAccess):
                copy_kernel[(1,)](source, target[:8], 64, 64)
            copy_kernel[(1,)](source, target, 64, 64)
        assert torch.equal(source, target)
        assert seen.launches == Counter(copy_kernel=2)

    def test_nests_and_restores(self):
        patched = [JITFunction, InterpretedFunction, GridExecutor, InterpreterBuilder, tl, tl.core, tl.tensor, tl.block_type]
        before = [dict(vars(owner)) for owner in patched]
        with watch() as outer:
            with pytest.raises(OutOfBoundsAccess), watch(poison=True) as inner:
                copy_kernel[(1,)](floats(8), torch.empty(4), 8, 64)
            target = torch.ones(64)
            forgetful_kernel[(1,)](floats(8), target, 8, 64)
        assert (outer.launches["copy_kernel"], inner.launches["copy_kernel"]) == (1, 1)
        assert outer.launches["forgetful_kernel"] == 1 and target[8:].eq(0).all()
        assert [dict(vars(owner)) for owner in patched] == before

    def test_does_nothing_without_triton(self):
        script = (
            "import sys; sys.modules['triton'] = None\n"
            "from gaugeblock.conformance.engine.triton.interpreter import watch\n"
            "with watch() as seen: pass\n"
            "assert not seen.launches and not seen.races"
        )
        subprocess.run([sys.executable, "-c", script], check=True)


class TestLimits:
    """What only a GPU or its compiler shows; a test that fails tells that a Triton release brought more."""

    def test_dots_too_small_for_the_compiler_are_accepted(self):
        a, b, target = floats(32, 4), floats(4, 32), torch.empty(32, 32)
        with watch():
            dot_kernel[(1,)](a, b, target, 4, "ieee")
        torch.testing.assert_close(target, a @ b)

    def test_argmax_resolves_open_ties_one_way(self):
        target = torch.empty(4, dtype=torch.int32)
        with watch():
            argmax_kernel[(1,)](torch.ones(4, 16), target, 16, False)
        assert target.unique().numel() == 1


def test_examples_have_programs_that_differ():
    assert PROGRAMS > 1 and all(len(example.arguments) for example in EXAMPLES.values())
