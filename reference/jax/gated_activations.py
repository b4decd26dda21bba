"""Gated activations of feed-forward networks: one half of a product, activated, times the other.

Shapes: B batch_size, S tokens of a sequence, I intermediate_size.
"""

import math

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.jax.layers import gelu as gelu_tanh
from gaugeblock.reference.jax.precision import at_least_float32


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.gated_activations.swiglu`."""
    validation.swiglu(gate, up)
    gate_BSI, up_BSI = at_least_float32(gate), at_least_float32(up)
    out_BSI = gate_BSI * jax.nn.sigmoid(gate_BSI) * up_BSI
    return out_BSI.astype(gate.dtype)


def geglu(gate: jax.Array, up: jax.Array, *, approximation: GeluApproximation) -> jax.Array:
    """As `gaugeblock.reference.torch.gated_activations.geglu`."""
    validation.geglu(gate, up, approximation)
    gate_BSI, up_BSI = at_least_float32(gate), at_least_float32(up)
    out_BSI = (gelu(gate_BSI) if approximation == "none" else gelu_tanh(gate_BSI)) * up_BSI
    return out_BSI.astype(gate.dtype)


def gelu(x: jax.Array) -> jax.Array:
    """Return x / 2 * (1 + erf(x / sqrt(2))), dtype as x."""
    return x / 2 * (1 + jax.lax.erf(x / math.sqrt(2)))
