"""The gated activations of `reference.torch.gated_activations`, compiled by torch.compile: activation and product fused.

Bound by memory, like the Triton version. One compilation serves all sizes but 0 and 1, which torch.compile treats by
themselves, as it does each dtype, order of strides and set of wanted gradients.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.torch import gated_activations as reference

# The references check their arguments while they are traced; an error that is raised there would lose its type.
_swiglu = torch.compile(reference.swiglu, dynamic=True)
_geglu = torch.compile(reference.geglu, dynamic=True)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Multiply up by the SiLU of gate: `reference.torch.gated_activations.swiglu`.

    Args:
        gate: [batch_size, num_tokens, intermediate_size], floating.
        up: [batch_size, num_tokens, intermediate_size]; same dtype.

    Returns:
        [batch_size, num_tokens, intermediate_size], dtype as gate; computed in float32 (float64 for float64 inputs) and
        rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together.

    Source: `gaugeblock.reference.torch.gated_activations.swiglu`.
    """
    validation.swiglu(gate, up)
    return _swiglu(gate, up)


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximation: GeluApproximation) -> torch.Tensor:
    """Multiply up by the GELU of gate: `reference.torch.gated_activations.geglu`.

    Args:
        gate: [batch_size, num_tokens, intermediate_size], floating.
        up: [batch_size, num_tokens, intermediate_size]; same dtype.
        approximation: "none" for the GELU with erf, "tanh" for the one with tanh.

    Returns:
        As `swiglu`.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: As `swiglu`, or approximation is another name.

    Source: `gaugeblock.reference.torch.gated_activations.geglu`.
    """
    validation.geglu(gate, up, approximation)
    return _geglu(gate, up, approximation=approximation)
