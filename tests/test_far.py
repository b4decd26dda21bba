"""Tensors that lie far apart in memory."""

import resource

import pytest
import torch

from gaugeblock.conformance.engine.inputs.cases import LAYOUTS, lay_out
from gaugeblock.conformance.engine.inputs.far import FAR, far_view, is_far
from gaugeblock.conformance.engine.processes.wire import Arena


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (33, 7), (1, 4, 3), (6, 5, 4), (1, 1, 3)])
def test_the_last_row_is_beyond_32_bits(shape, dtype):
    values = (torch.rand(shape) * 9).to(dtype)
    far = far_view(values)
    assert torch.equal(far, values) and far.shape == values.shape and far.dtype == dtype
    dimension = next(each for each, size in enumerate(shape) if size > 1)
    assert far.stride(dimension) * (shape[dimension] - 1) >= FAR
    assert (far.stride(dimension) < FAR) == (shape[dimension] > 2)
    last = max(each for each, size in enumerate(shape) if size > 1)
    assert far.stride(last) * (shape[last] - 1) >= FAR and (far.stride(last) < FAR) == (shape[last] > 2)
    assert is_far(far) and is_far(far.detach()) and is_far(far[-1:]) and not is_far(values) and not is_far(far.contiguous())


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (1, 1)])
def test_what_has_no_rows_is_copied(shape):
    values = torch.ones(shape)
    assert torch.equal(lay_out(values, "far"), values) and not is_far(lay_out(values, "far"))


def test_of_many_elements_the_rows_alone_lie_apart():
    far = far_view(torch.rand(64, 256))
    assert far.stride(0) * 63 >= FAR and far.stride(1) == 1


def test_it_takes_no_memory_but_that_of_its_values():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = [far_view(torch.ones(64, 16)) for _ in range(16)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert sum(each.untyped_storage().nbytes() for each in held) > 2**37


def test_an_offset_of_32_bits_reaches_zeros():
    far = far_view(torch.ones(9, 4))
    offset = torch.tensor(8, dtype=torch.int32) * torch.tensor(far.stride(0), dtype=torch.int32)
    assert offset < 0
    assert far.as_strided((4,), (1,), far.storage_offset() + int(offset)).eq(0).all()


@pytest.mark.parametrize("part", [slice(0, 1), slice(2, 3)])
def test_a_part_of_one_row_travels_without_the_memory_between(part):
    far, arena = far_view(torch.arange(6.0).view(3, 2)), Arena(shared=False)
    assert far[part, 0].is_contiguous() and is_far(far[part, 0])
    for sent in (far[part], far[part, 0]):  # the last is contiguous as it lies
        placed, end = arena.place({"part": sent}, 0)
        assert end < 1024 and torch.equal(arena.tensors(placed)["part"], sent)


def test_the_layout_property_leaves_it_to_another():
    assert "far" not in LAYOUTS
