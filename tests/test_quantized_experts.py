"""Quantized experts: worked examples."""

import torch

from gaugeblock.reference.torch import quantized_experts


def test_a_worked_example():
    """Two experts of one column, by hand: expert 1 alone is chosen, twice, with weights that sum to 3 / 4.

    gate = 0.5 * (1 * 2 + 2 * 4) = 5, up = 0.25 * (-4 * 2 + 3 * 4) = 1; silu(5) * 1 = 4.966536; times w2 = (2 * 3, 0.125 * -128).
    """
    out = quantized_experts.fused_swiglu_int8(
        torch.tensor([[2.0, 4.0]]),
        torch.tensor([[[9, 9], [9, 9]], [[1, 2], [-4, 3]]], dtype=torch.int8),
        torch.tensor([[9.0, 9.0], [0.5, 0.25]]),
        torch.tensor([[[9], [9]], [[3], [-128]]], dtype=torch.int8),
        torch.tensor([[9.0, 9.0], [2.0, 0.125]]),
        torch.tensor([[0.5, 0.25]]),
        torch.tensor([[1, 1]]),
    )
    expected = 0.75 * 4.9665357 * torch.tensor([[6.0, -16.0]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def test_a_worked_example_in_e4m3():
    """By hand, in blocks of 2: the token becomes 448 and 34 / 448 * 448 = 32 (36 is as near, and odd), its scale is 1.

    gate = 2 * 448 * 1 / 16 + 2 * 32 / 16 = 60, up = 0.5 * 32 / 16 = 1, with scales 2 and 0.5 of the blocks; silu(60) * 1 = 60
    is the largest of its group and stays; the output is 60 * 3 * (1, -1).
    """
    out = quantized_experts.fused_swiglu_fp8(
        torch.tensor([[448.0, 34.0]]).requires_grad_(),
        torch.tensor([[[1 / 16, 1 / 16], [0, 0], [0, 1 / 16], [0, 0]]]).to(torch.float8_e4m3fn),
        torch.tensor([[[2.0], [0.5]]]),
        torch.tensor([[[1.0, 9], [-1, 9]]]).to(torch.float8_e4m3fn),
        torch.tensor([[[3.0]]]),
        torch.tensor([[1.0]]),
        torch.tensor([[0]]),
        block_size=2,
    )
    torch.testing.assert_close(out, torch.tensor([[180.0, -180.0]]), rtol=1e-6, atol=0)
    assert not out.requires_grad  # that of what is rounded to eight bits is 0, or what one wants it to be
