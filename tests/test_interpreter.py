"""Our interpreter of Triton kernels: what it runs, what it leaves to Triton's own, and what it tells of a launch."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels, tl.sum too, are decorated

import subprocess
import sys
from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction

from gaugeblock.conformance.engine.triton.interpreter import OutOfBoundsAccess, control_flow, watch
from tests.interpreted_kernels import EXAMPLES, PROGRAMS
from tests.small_kernels import (
    add_kernel,
    argmax_kernel,
    assembly_kernel,
    barrier_kernel,
    copy_kernel,
    dot_kernel,
    floats,
    forgetful_kernel,
    gathering_kernel,
    square_kernel,
    two_configs_kernel,
    wide_range_kernel,
)

# Triton 3.6 cannot sort in an interpreter: its `tl.sort` compares None.
RUNNABLE = [name for name in EXAMPLES if name != "sort_topk_flip" or not triton.__version__.startswith("3.6.")]


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
