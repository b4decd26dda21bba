"""Gated activations of feed-forward networks: one half of a product, activated, times the other."""

import math

import jax

from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.jax.layers import gelu as gelu_tanh


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.gated_activations.swiglu`."""
    return jax.nn.silu(gate) * up


def geglu(gate: jax.Array, up: jax.Array, *, approximation: GeluApproximation) -> jax.Array:
    """As `gaugeblock.reference.torch.gated_activations.geglu`."""
    return (gelu(gate) if approximation == "none" else gelu_tanh(gate)) * up


def gelu(x: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.gated_activations.gelu`."""
    return x / 2 * (1 + jax.lax.erf(x / math.sqrt(2)))
