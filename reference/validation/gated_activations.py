"""Calls of gated activations."""

from typing import Any

from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.validation.arrays import FLOATING, require_dtype, require_like, require_one_of, require_shape


def swiglu(gate: Any, up: Any) -> None:
    """Check the arguments of `gated_activations.swiglu`."""
    require_dtype("gate", gate, FLOATING)
    sizes = {"batch_size": None, "num_tokens": None, "intermediate_size": None}
    require_shape("gate", gate, **sizes)
    require_like("up", up, "gate", gate, **dict(zip(sizes, gate.shape, strict=True)))


def geglu(gate: Any, up: Any, approximation: Any) -> None:
    """Check the arguments of `gated_activations.geglu`."""
    swiglu(gate, up)
    require_one_of("approximation", approximation, GeluApproximation)
