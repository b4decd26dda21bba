"""Triton's interpreter: the defects the gate works around, what it relies on, and our guards around a launch.

A test of a defect fails when a Triton release mends it; its message says what to change then.
"""

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
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gaugeblock.conformance.triton_checks.interpreter import OutOfBoundsAccess, shuffled_programs, watch

BF16_UNSUPPORTED = "bfloat16 under the interpreter need no longer be 'not supported' on account of this"


def mended(consequence: str) -> str:
    return f"Triton {triton.__version__} mended an interpreter defect (JUDGING.md section 8): {consequence}"


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
def rounding_copy_kernel(source, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index).to(target.dtype.element_ty, fp_downcast_rounding="rtne"))


@triton.jit
def add_kernel(a, b, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(a + index) + tl.load(b + index))


@triton.jit
def larger_kernel(a, b, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x, y = tl.load(a + index), tl.load(b + index)
    tl.store(target + index, tl.where(x > y, x, y))


@triton.jit
def dot_kernel(a, b, target, K: tl.constexpr, PRECISION: tl.constexpr):
    row, inner = tl.arange(0, 32), tl.arange(0, K)
    x = tl.load(a + row[:, None] * K + inner[None, :])
    y = tl.load(b + inner[:, None] * 32 + row[None, :])
    product = tl.dot(x, y, input_precision=PRECISION)
    tl.store(target + row[:, None] * 32 + row[None, :], product)


@triton.jit
def atomic_add_kernel(target, index, value, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.atomic_add(target + tl.load(index + lane), tl.load(value + lane))


@triton.jit
def argmax_kernel(source, target, COLUMNS: tl.constexpr, TIE_BREAK_LEFT: tl.constexpr):
    row, column = tl.arange(0, 4), tl.arange(0, COLUMNS)
    values = tl.load(source + row[:, None] * COLUMNS + column[None, :])
    tl.store(target + row, tl.argmax(values, axis=1, tie_break_left=TIE_BREAK_LEFT))


@triton.jit
def sort_kernel(source, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.sort(tl.load(source + index)))


@triton.jit
def ticket_kernel(counter, order):
    tl.store(order + tl.atomic_add(counter, 1), tl.program_id(0) * 2 + tl.program_id(1))


@triton.jit
def square_kernel(source, target, FACTOR):
    tl.store(target, tl.load(source + FACTOR * FACTOR))


@triton.jit
def tanh_kernel(target):
    tl.store(target, libdevice.tanh(tl.load(target)))


@triton.jit
def assembly_kernel(target):
    value = tl.load(target)
    tl.store(target, tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], tl.float32, True, 1))


@triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["size"])
@triton.jit
def two_configs_kernel(source, target, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < size), mask=index < size)


@triton.autotune(configs=[triton.Config({"BLOCK": 64})], key=["size"])
@triton.jit
def one_config_kernel(source, target, size, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index, mask=index < size), mask=index < size)


@triton.jit
def descriptor_kernel(descriptor, target, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(target + index, descriptor.load([0]))


@triton.jit
def pointer_table_kernel(table, target):
    source = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(target, tl.load(source))


class TestDefects:
    def test_float32_to_bfloat16_truncates(self):
        source, target = floats(256), torch.empty(256, dtype=torch.bfloat16)
        copy_kernel[(1,)](source, target, 256, 256)
        assert not torch.equal(target, source.bfloat16()), mended(BF16_UNSUPPORTED)

    def test_explicit_rounding_to_bfloat16_is_wrong(self):
        source, target = floats(256), torch.empty(256, dtype=torch.bfloat16)
        rounding_copy_kernel[(1,)](source, target, 256)
        assert not torch.equal(target, source.bfloat16()), mended(BF16_UNSUPPORTED)

    def test_bfloat16_addition_adds_bit_patterns(self):
        a, b = floats(2, 256, dtype=torch.bfloat16)
        target = torch.empty(256, dtype=torch.bfloat16)
        add_kernel[(1,)](a, b, target, 256)
        assert not torch.allclose(target, a + b, atol=1), mended(BF16_UNSUPPORTED)

    def test_bfloat16_comparison_compares_bit_patterns(self):
        a, b = floats(2, 256, dtype=torch.bfloat16)
        target = torch.empty(256, dtype=torch.bfloat16)
        larger_kernel[(1,)](a, b, target, 256)
        assert not torch.equal(target, torch.maximum(a, b)), mended(BF16_UNSUPPORTED)

    def test_bfloat16_dot_multiplies_bit_patterns(self):
        a, b = floats(2, 32, 32, dtype=torch.bfloat16)
        target = torch.empty(32, 32)
        dot_kernel[(1,)](a, b, target, 32, "ieee")
        assert not torch.allclose(target, a.float() @ b.float(), atol=1), mended(BF16_UNSUPPORTED)

    def test_bfloat16_atomic_add_is_unsupported(self):
        index, target = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.bfloat16)
        with pytest.raises(InterpreterError, match="Unsupported data type"):
            atomic_add_kernel[(1,)](target, index, torch.ones(16, dtype=torch.bfloat16), 16)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_float32_to_float8_is_wrong(self, dtype):
        source, target = floats(2048), torch.empty(2048, dtype=dtype)
        copy_kernel[(1,)](source, target, 2048, 2048)
        rounded = source.to(dtype).float()
        assert not torch.equal(target.float(), rounded), mended("float8 stores can be judged")

    def test_masked_lanes_without_other_load_zero(self):
        target = torch.full((64,), 5.0)
        forgetful_kernel[(1,)](floats(40), target, 40, 64)
        assert target[40:].eq(0).all(), mended("the poisoning in triton_checks/interpreter.py may go")

    def test_programs_run_in_grid_order(self):
        order = torch.empty(8, dtype=torch.int32)
        ticket_kernel[(4, 2)](torch.zeros(1, dtype=torch.int32), order)
        assert order.tolist() == list(range(8)), mended("shuffled_programs may go")

    def test_tf32_is_not_modelled(self):
        a, b = floats(2, 32, 32)
        tf32, ieee = torch.empty(2, 32, 32)
        dot_kernel[(1,)](a, b, tf32, 32, "tf32")
        dot_kernel[(1,)](a, b, ieee, 32, "ieee")
        assert torch.equal(tf32, ieee), mended("tf32 left on by mistake can be caught without a GPU")

    def test_dots_too_small_for_the_compiler_are_accepted(self):
        a, b, target = floats(32, 4), floats(4, 32), torch.empty(32, 32)
        dot_kernel[(1,)](a, b, target, 4, "ieee")
        torch.testing.assert_close(target, a @ b, msg=mended("codegen is not the only place to find K < 16"))

    def test_autotune_with_two_configs_needs_a_gpu(self):
        with pytest.raises(RuntimeError, match="active drivers"):
            two_configs_kernel[(2,)](floats(100), torch.empty(100), 100)

    def test_libdevice_is_unsupported(self):
        with pytest.raises(InterpreterError):
            tanh_kernel[(1,)](floats(1))

    def test_inline_assembly_is_unsupported(self):
        with pytest.raises(InterpreterError, match="not supported in interpreter mode"):
            assembly_kernel[(1,)](floats(1))

    def test_argmax_resolves_open_ties_one_way(self):
        target = torch.empty(4, dtype=torch.int32)
        argmax_kernel[(1,)](torch.ones(4, 16), target, 16, False)
        assert target.unique().numel() == 1, mended("a missing tie_break_left can be caught without a GPU")

    def test_sort_loses_a_nan(self):
        source, target = floats(16), torch.empty(16)
        source[3] = torch.nan
        sort_kernel[(1,)](source, target, 16)
        assert target.isnan().sum() != 1, mended("kernels that sort may be judged on NaN")


class TestWhatWeRelyOn:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_dot_accumulates_in_float32(self, dtype):
        a, b = floats(2, 32, 32, dtype=dtype)
        target = torch.empty(32, 32)
        dot_kernel[(1,)](a, b, target, 32, "ieee")
        torch.testing.assert_close(target, a.float() @ b.float())

    def test_bfloat16_loads_widen_exactly(self):
        source, target = floats(256, dtype=torch.bfloat16), torch.empty(256)
        copy_kernel[(1,)](source, target, 256, 256)
        assert torch.equal(target, source.float())

    def test_float32_to_float16_rounds_to_nearest_even(self):
        source, target = floats(2048), torch.empty(2048, dtype=torch.float16)
        copy_kernel[(1,)](source, target, 2048, 2048)
        assert torch.equal(target, source.half())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int64])
    def test_atomics_add_every_lane(self, dtype):
        index = torch.arange(64, dtype=torch.int32) % 4
        target = torch.zeros(4, dtype=dtype)
        atomic_add_kernel[(1,)](target, index, torch.ones(64, dtype=dtype), 64)
        assert target.eq(16).all()

    def test_argmax_takes_the_first_of_ties(self):
        source = torch.tensor([[0.0, 2, 2, 1], [3, 3, 3, 3], [0, 0, 0, 1], [-1, -2, -1, -3]])
        target = torch.empty(4, dtype=torch.int32)
        argmax_kernel[(1,)](source, target, 4, True)
        assert target.tolist() == [1, 0, 3, 0]

    def test_32_bit_offsets_wrap_as_on_a_gpu(self):
        with watch(), pytest.raises(OutOfBoundsAccess):
            square_kernel[(1,)](torch.ones(4), torch.zeros(1), 46341)

    def test_autotune_with_one_config_works(self):
        source, target = floats(100), torch.empty(100)
        one_config_kernel[lambda config: (triton.cdiv(100, config["BLOCK"]),)](source, target, 100)
        assert torch.equal(source, target)


class TestWatch:
    def test_counts_launches_per_kernel(self):
        with watch() as seen:
            copy_kernel[(2,)](floats(100), torch.empty(100), 100, 64)
            copy_kernel[(1,)](floats(8), torch.empty(8), 8, 64)
            add_kernel[(1,)](floats(64), floats(64), torch.empty(64), 64)
        assert seen.launches == Counter(copy_kernel=2, add_kernel=1)

    def test_legitimate_kernels_pass(self):
        target = torch.empty(1)
        with watch():
            careful_kernel[(1,)](floats(40), target, 40, 64)
        torch.testing.assert_close(target[0], floats(40).sum())

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

    def test_strided_view_may_be_accessed_over_its_whole_extent(self):
        with watch():
            square_kernel[(1,)](torch.ones(5, 4)[:, :2], torch.zeros(1), 4)

    def test_expanded_tensor_has_the_extent_of_one_element(self):
        with watch(), pytest.raises(OutOfBoundsAccess, match="63 of 64 lanes"):
            copy_kernel[(1,)](torch.ones(1).expand(64), torch.empty(64), 64, 64)

    def test_empty_tensor_may_not_be_accessed(self):
        with watch(), pytest.raises(OutOfBoundsAccess):
            copy_kernel[(1,)](floats(4), torch.empty(0), 4, 64)

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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
    def test_masked_lanes_without_other_load_nan(self, dtype):
        source, target = torch.ones(40, dtype=dtype), torch.zeros(64, dtype=dtype)
        with watch():
            forgetful_kernel[(1,)](source, target, 40, 64)
        assert target[:40].float().eq(1).all() and target[40:].isnan().all()

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_masked_integer_lanes_without_other_are_large_negative_and_zero(self, dtype):
        source, target = torch.ones(40, dtype=dtype), torch.zeros(64, dtype=dtype)
        with watch():
            forgetful_kernel[(1,)](source, target, 40, 64)
        large = torch.iinfo(dtype).max // 3
        assert set(target[40:].tolist()) == {large, torch.tensor(-large).to(dtype).item(), 0}

    def test_error_leaves_the_process_usable(self):
        source, target = floats(64), torch.empty(64)
        with watch() as seen:
            with pytest.raises(OutOfBoundsAccess):
                copy_kernel[(1,)](source, target[:8], 64, 64)
            copy_kernel[(1,)](source, target, 64, 64)
        assert torch.equal(source, target)
        assert seen.launches == Counter(copy_kernel=2)

    def test_other_errors_pass_unchanged(self):
        with watch(), pytest.raises(InterpreterError, match="not supported in interpreter mode"):
            assembly_kernel[(1,)](floats(1))

    def test_nests_and_restores(self):
        patched = [JITFunction, InterpretedFunction, GridExecutor, InterpreterBuilder]
        before = [dict(vars(owner)) for owner in patched]
        with watch() as outer:
            with pytest.raises(OutOfBoundsAccess), watch() as inner:
                copy_kernel[(1,)](floats(8), torch.empty(4), 8, 64)
            copy_kernel[(1,)](floats(8), torch.empty(8), 8, 64)
        assert (outer.launches["copy_kernel"], inner.launches["copy_kernel"]) == (2, 1)
        assert [dict(vars(owner)) for owner in patched] == before

    def test_does_nothing_without_triton(self):
        script = (
            "import sys; sys.modules['triton'] = None\n"
            "from gaugeblock.conformance.triton_checks.interpreter import watch\n"
            "with watch() as seen: pass\n"
            "assert not seen.launches"
        )
        subprocess.run([sys.executable, "-c", script], check=True)


class TestShuffledPrograms:
    def test_each_program_runs_once_in_an_order_of_the_seed(self):
        orders = torch.empty(3, 12, dtype=torch.int32)
        for order, seed in zip(orders, (0, 0, 1), strict=True):
            with shuffled_programs(seed):
                ticket_kernel[(6, 2)](torch.zeros(1, dtype=torch.int32), order)
        assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
        assert orders.sort(dim=1).values.eq(torch.arange(12)).all()

    def test_watch_still_sees_inside(self):
        with shuffled_programs(0), watch() as seen, pytest.raises(OutOfBoundsAccess):
            copy_kernel[(4,)](floats(100), torch.empty(50), 100, 32)
        assert seen.launches == Counter(copy_kernel=1)
