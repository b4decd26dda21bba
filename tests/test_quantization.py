"""Quantization: a worked example, and every number of e4m3."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import finegrained_fp8

from gaugeblock.optimized.triton import quantization as kernels
from gaugeblock.reference.torch import quantization


@pytest.mark.parametrize("quantize", [quantization.quantize_token_groups, kernels.quantize_token_groups])
def test_a_worked_example(quantize):
    """By hand: between 32 and 64 numbers of e4m3 lie 4 apart, below 2^-6 2^-9 apart; the last group has one column."""
    hidden = torch.tensor([[-896.0, 66, 68, 70, 0.0], [0, 0, 0, 0, -7]])
    quantized, scales = quantize(hidden, group_size=4)
    assert quantized.float().tolist() == [[-448, 32, 32, 36, 0], [0, 0, 0, 0, -448]]  # 34 lies between 32 and 36, and 36 is odd
    assert scales.tolist() == [[2, 0], [0, 2**-6]]
    small, _ = quantize(torch.tensor([[448.0, 2.5 * 2**-9, 3.5 * 2**-9, 2**-10, 1.01 * 2**-10]]), group_size=8)
    assert small.float().tolist() == [[448, 2 * 2**-9, 4 * 2**-9, 0, 2**-9]]


@pytest.mark.parametrize("quantize", [quantization.quantize_token_groups, kernels.quantize_token_groups])
def test_numbers_of_e4m3_and_those_just_beside_their_middles(quantize):
    """All 127 magnitudes stay; one float32 before the middle of two goes down, one behind it up."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    below, above = (torch.nextafter(middles, middles + sign) for sign in (-1.0, 1.0))
    for values, expected in ((numbers, numbers), (below, numbers[:-1]), (above, numbers[1:]), (-above, -numbers[1:])):
        row = torch.cat([torch.tensor([448.0]), values])[None]  # so that the scale is 1
        quantized, _ = quantize(row, group_size=len(row[0]))
        assert torch.equal(quantized.float()[0, 1:], expected)


@pytest.mark.parametrize("group_size", [1, 16, 128])
def test_groups_are_what_transformers_makes_of_blocks_of_one_row(group_size, monkeypatch):
    """In float64, where neither rounds: scales and quotients to its last digits."""
    monkeypatch.setattr(finegrained_fp8, "_FP8_DTYPE", torch.float64)
    monkeypatch.setattr(torch, "float32", torch.float64)
    torch.manual_seed(0)
    hidden = torch.randn(5, 256, dtype=torch.float64) * torch.tensor([1e-3, 1, 1e3, 1e6, 1e-6])[:, None].double()
    config = SimpleNamespace(weight_block_size=(1, group_size), scale_fmt=None)
    convert = finegrained_fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))
    theirs = convert._quantize_one("tokens", hidden).values()
    for ours, expected in zip(quantization.quantize_token_groups(hidden, group_size=group_size), theirs, strict=True):
        assert ours.dtype == expected.dtype == torch.float64
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=0)
