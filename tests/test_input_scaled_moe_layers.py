"""Llama 4's layer by a worked example."""

import math

import pytest
import torch
from test_references import assert_equal_to_rounding

from gaugeblock.reference.torch import input_scaled_moe_layers

STATE = {
    "router.weight": torch.tensor([[0.0], [math.log(3)], [-1.0]], dtype=torch.float64),
    "experts.gate_up_proj": torch.tensor([[[1.0, 2.0]], [[3.0, 5.0]], [[7.0, 7.0]]], dtype=torch.float64),  # [E, H, 2I]
    "experts.down_proj": torch.tensor([2.0, 4.0, 7.0], dtype=torch.float64)[:, None, None],
    "shared_expert.gate_proj.weight": torch.tensor([[1.0]], dtype=torch.float64),
    "shared_expert.up_proj.weight": torch.tensor([[1.0]], dtype=torch.float64),
    "shared_expert.down_proj.weight": torch.tensor([[1.0]], dtype=torch.float64),
}


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_worked_example(top_k):
    """A token of 1: the sigmoid of log 3 is 3/4, that of 0 is 1/2, and both meet the token before the experts do."""
    out, logits, ids = input_scaled_moe_layers.llama4_moe(torch.ones(1, 1, dtype=torch.float64), STATE, top_k=top_k)
    best, second, shared = 4 * silu(3 * 0.75) * 5 * 0.75, 2 * silu(1 * 0.5) * 2 * 0.5, silu(1)
    assert ids.tolist() == [[1, 0][:top_k]]
    assert_equal_to_rounding(out, [[best + (second if top_k == 2 else 0) + shared]])
    assert logits[0, 1].item() == math.log(3)
