"""Arithmetic of our interpreter of Triton kernels: results as of Triton's own, right where that is wrong."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels, tl.sum too, are decorated


import pytest
import torch

from gaugeblock.conformance.engine.triton.interpreter import watch
from tests.small_kernels import (
    arithmetic_kernel,
    atomic_add_kernel,
    copy_kernel,
    cut_off_kernel,
    dot_kernel,
    floats,
    sum_kernel,
    to_int_kernel,
)


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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
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
