"""The Triton experts of e4m3: what chips multiply as it is, the gate's interpreter multiplies as float16."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import pytest
import torch
import triton
import triton.language as tl

from gaugeblock.conformance.engine.inputs.cases import Case, make_inputs
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.conformance.engine.triton.interpreter import watch
from gaugeblock.optimized.triton import fp8_experts
from gaugeblock.optimized.triton.quantization import from_e4m3_bits
from gaugeblock.reference.torch import quantized_experts as reference

CONTRACT = find_contract("quantized_experts.fused_swiglu_fp8")


@triton.jit
def numbers_kernel(bits_ptr, numbers_ptr):
    codes = tl.arange(0, 256)
    tl.store(numbers_ptr + codes, from_e4m3_bits(tl.load(bits_ptr + codes)))


def test_every_code_of_e4m3_is_its_number():
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = torch.empty(256, dtype=torch.float16)
    with watch():
        numbers_kernel[(1,)](bits, numbers)
    torch.testing.assert_close(numbers, bits.view(torch.float8_e4m3fn).half(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("landmark", CONTRACT.landmarks, ids=lambda sizes: str(sizes["block_size"]))
def test_numbers_and_their_bits_give_the_same(landmark, monkeypatch):
    """On the lattice every sum is exact, so that the tiles of neither make a difference."""
    inputs = make_inputs(CONTRACT, Case(**landmark, regime="lattice"), "float32")
    operands = []
    as_operand = fp8_experts._as_operand
    monkeypatch.setattr(fp8_experts, "_as_operand", lambda numbers: operands.append(as_operand(numbers)) or operands[-1])

    outs = []
    for multiplies in (False, True):
        monkeypatch.setattr(fp8_experts, "multiplies_e4m3", lambda multiplies=multiplies: multiplies)
        with watch():
            outs.append(fp8_experts.fused_swiglu_fp8(**inputs, block_size=landmark["block_size"]))
    assert [each.dtype for each in operands] == 4 * [torch.uint8] + 4 * [torch.float8_e4m3fn]
    assert torch.equal(*outs)
    assert torch.equal(outs[0], reference.fused_swiglu_fp8(**inputs, block_size=landmark["block_size"]))


def test_scales_and_sums_keep_the_digits_of_float32():
    """The lattice is far from ties of e4m3, so that scales of more digits change no quantized number: only what they scale.

    What bfloat16 takes from a scale or a sum, 2^-9, is far below what a budget allows beside the roundings to e4m3.
    """
    landmark = CONTRACT.landmarks[0]
    inputs = make_inputs(CONTRACT, Case(**landmark, regime="lattice"), "float32")
    for name in ("w13_scales", "w2_scales"):
        inputs[name] = inputs[name] * 1.003
    with watch():
        out = fp8_experts.fused_swiglu_fp8(**inputs, block_size=landmark["block_size"])
    expected = reference.fused_swiglu_fp8(**inputs, block_size=landmark["block_size"])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
