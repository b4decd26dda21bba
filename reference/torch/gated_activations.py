"""Gated activations of feed-forward networks: one half of a product, activated, times the other.

Shapes: B batch_size, S tokens of a sequence, I intermediate_size.
"""

import math

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.torch.layers import gelu as gelu_tanh
from gaugeblock.reference.torch.precision import at_least_float32


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Multiply up by the SiLU of gate.

        out = silu(gate) * up,  silu(x) = x * sigmoid(x)

    Args:
        gate: [batch_size, num_tokens, intermediate_size], floating; with up often the halves of one array, in either order.
        up: [batch_size, num_tokens, intermediate_size]; same dtype.

    Returns:
        [batch_size, num_tokens, intermediate_size], dtype as gate; computed in float32 (float64 for float64 inputs) and
        rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together.

    Source: Shazeer 2020 (arXiv:2002.05202), equation 5, SwiGLU without biases.
    """
    validation.swiglu(gate, up)
    gate_BSI, up_BSI = at_least_float32(gate), at_least_float32(up)
    out_BSI = gate_BSI * torch.sigmoid(gate_BSI) * up_BSI
    return out_BSI.to(gate.dtype)


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximation: GeluApproximation) -> torch.Tensor:
    """Multiply up by the GELU of gate.

        out = gelu(gate) * up
        gelu(x) = x / 2 * (1 + erf(x / sqrt(2))), or x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))

    Args:
        gate: [batch_size, num_tokens, intermediate_size], floating; with up often the halves of one array, in either order.
        up: [batch_size, num_tokens, intermediate_size]; same dtype.
        approximation: "none" for the GELU with erf, "tanh" for the one with tanh.

    Returns:
        [batch_size, num_tokens, intermediate_size], dtype as gate; computed in float32 (float64 for float64 inputs) and
        rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or approximation is another name.

    Source: Shazeer 2020 (arXiv:2002.05202), equation 5, GEGLU without biases; both GELUs: Hendrycks and Gimpel
    (arXiv:1606.08415), section 2.
    """
    validation.geglu(gate, up, approximation)
    gate_BSI, up_BSI = at_least_float32(gate), at_least_float32(up)
    out_BSI = (gelu(gate_BSI) if approximation == "none" else gelu_tanh(gate_BSI)) * up_BSI
    return out_BSI.to(gate.dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Return x / 2 * (1 + erf(x / sqrt(2))), dtype as x."""
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
