"""What experts compute between their two products, and its derivatives, element by element in float32.

A gated expert has two pre-activations, gate and up, of which `activate` makes nonlinearity(gate) * up; an expert
without a gate has one and no up. "clamped" is that of gpt-oss: gate and up are clamped, and up counts from 1 on.
"""

from typing import Literal, NamedTuple

import triton
import triton.language as tl

Nonlinearity = Literal["silu", "gelu", "gelu_tanh", "clamped"]


class Activation(NamedTuple):
    """What an expert computes between its two products."""

    nonlinearity: Nonlinearity
    gated: bool = True
    """Whether there are gate and up; else the nonlinearity of the one product is all."""
    interleaved: bool = False
    """Whether rows of the first matrix are gate 0, up 0, gate 1, ..., not all of gate, then all of up."""
    alpha: float = 1.0
    """Of "clamped": silu is gate * sigmoid(alpha * gate)."""
    limit: float = 0.0
    """Of "clamped": the greatest gate and the greatest absolute up."""

    @property
    def products(self) -> int:
        """Rows of the first matrix to a column of the activation."""
        return 2 if self.gated else 1

    @property
    def options(self) -> dict[str, object]:
        """The keyword arguments of a launch."""
        return {
            "alpha": self.alpha,
            "limit": self.limit,
            "NONLINEARITY": self.nonlinearity,
            "GATED": self.gated,
            "INTERLEAVED": self.interleaved,
        }


@triton.jit
def rows_of(columns, intermediate_size, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Return the rows of the first matrix for these columns of the activation: of gate, and of up."""
    if GATED and INTERLEAVED:
        gate = 2 * columns
        up = gate + 1
    else:
        gate = columns
        up = columns + intermediate_size
    return gate, up


@triton.jit
def distance_to_up(row_stride, intermediate_size, INTERLEAVED: tl.constexpr):
    """Return how far behind a row of gate the row of up lies that goes with it: one address less to hold."""
    if INTERLEAVED:
        distance = row_stride
    else:
        distance = tl.cast(intermediate_size, tl.int64) * row_stride
    return distance


@triton.jit
def _sigmoid(x):
    decay = tl.exp(-tl.abs(x))  # not exp(-x), which overflows
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def _nonlinearity_and_slope(x, alpha, NONLINEARITY: tl.constexpr):
    if NONLINEARITY == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))  # of a normal distribution
        density = tl.exp(-0.5 * x * x) * 0.3989422804014327
        value = x * below
        slope = below + x * density
    elif NONLINEARITY == "gelu_tanh":
        # (1 + tanh(y)) / 2 = sigmoid(2 y), which keeps its digits where the tanh is near -1
        doubled = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        sigmoid = _sigmoid(doubled)
        value = x * sigmoid
        # not 1 - sigmoid, of whose last digit x * x * x makes much
        slope = sigmoid + value * _sigmoid(-doubled) * (1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        sigmoid = _sigmoid(alpha * x)
        value = x * sigmoid
        slope = sigmoid * (1.0 + alpha * x * (1.0 - sigmoid))
    return value, slope


@triton.jit
def _clamp(gate, up, limit, NONLINEARITY: tl.constexpr):
    if NONLINEARITY == "clamped":  # comparisons that let NaN through
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
    return gate, up


@triton.jit
def activate(gate, up, alpha, limit, NONLINEARITY: tl.constexpr, GATED: tl.constexpr):
    """Return the activation."""
    gate, up = _clamp(gate, up, limit, NONLINEARITY)
    value, _ = _nonlinearity_and_slope(gate, alpha, NONLINEARITY)
    if GATED:
        value *= up
    return value


@triton.jit
def swiglu(gate, up):
    """Return silu(gate) * up."""
    return activate(gate, up, 1.0, 0.0, NONLINEARITY="silu", GATED=True)


@triton.jit
def activate_backward(gate, up, slope, alpha, limit, NONLINEARITY: tl.constexpr, GATED: tl.constexpr):
    """Return the activation, and the gradients of gate and up for this gradient of the activation.

    Where a clamp binds, the gradient is 0; at the limit itself it is not, as in torch.
    """
    clamped_gate, clamped_up = _clamp(gate, up, limit, NONLINEARITY)
    value, of_gate = _nonlinearity_and_slope(clamped_gate, alpha, NONLINEARITY)
    activation = value
    gate_gradient = slope * of_gate
    up_gradient = slope * value
    if GATED:
        activation = value * clamped_up
        gate_gradient *= clamped_up
    if NONLINEARITY == "clamped":
        gate_gradient = tl.where(gate > limit, 0.0, gate_gradient)
        up_gradient = tl.where(tl.abs(up) > limit, 0.0, up_gradient)
    return activation, gate_gradient, up_gradient
