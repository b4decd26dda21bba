"""Gated activations of feed-forward networks: one half of a product, activated, times the other."""

import math

import torch

from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.torch.layers import gelu as gelu_tanh


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, silu(x) = x * sigmoid(x)."""
    return torch.nn.functional.silu(gate) * up


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximation: GeluApproximation) -> torch.Tensor:
    """Return gelu(gate) * up; gelu(x) = x / 2 * (1 + erf(x / sqrt(2))), or its approximation by tanh."""
    return (gelu(gate) if approximation == "none" else gelu_tanh(gate)) * up


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x / 2 * (1 + erf(x / sqrt(2))), dtype as x."""
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
