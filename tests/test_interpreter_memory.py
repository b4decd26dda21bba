"""Memory in our interpreter of Triton kernels: what lies out of bounds, masked lanes, races, and the order of programs."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels, tl.sum too, are decorated


import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gaugeblock.conformance.engine.triton.interpreter import OutOfBoundsAccess, watch
from tests.small_kernels import (
    add_kernel,
    atomic_add_kernel,
    careful_kernel,
    copy_kernel,
    descriptor_kernel,
    floats,
    forgetful_kernel,
    interior,
    neighbour_kernel,
    overlapping_kernel,
    pointer_table_kernel,
    square_kernel,
    ticket_kernel,
    two_targets_kernel,
)


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
