"""SwiGLU and GEGLU between the two products of a feed-forward network: one kernel forward, one backward.

    out = nonlinearity(gate) * up

Both are bound by memory. Forward reads gate and up and writes the result; backward reads gate, up and the gradient and writes
two gradients, each once: the nonlinearity is computed again, which costs less than to read it. gate and up may be the halves of
one product, in any order: rows are addressed by their strides, and nothing is copied.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.activations import Nonlinearity, activate, activate_backward
from gaugeblock.optimized.triton.launch import device_of, program_columns, reject_float64, require_triton_device
from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation

# Rows and columns of a program's block, for 4 warps: a thread has 8 elements of each tensor, one load of 16 bytes in bfloat16.
BLOCK = (4, 256)
NONLINEARITIES: dict[GeluApproximation, Nonlinearity] = {"none": "gelu", "tanh": "gelu_tanh"}


@triton.jit
def _rows(num_tokens, BLOCK_TOKENS: tl.constexpr):
    """Return the example of this program, its tokens, [BLOCK_TOKENS, 1], and their rows counted over the batch, all int64."""
    num_chunks = tl.cdiv(num_tokens, BLOCK_TOKENS)
    example = tl.program_id(0) // num_chunks  # of 32 bits: a GPU has no division of 64
    chunk = (tl.program_id(0) - example * num_chunks).to(tl.int64)
    tokens = chunk * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    return example.to(tl.int64), tokens, example.to(tl.int64) * num_tokens + tokens


@triton.jit
def _load(base_ptr, example, tokens, columns, example_stride, token_stride, column_stride, mask):
    """Return float32, 0 where masked."""
    pointers = base_ptr + example * example_stride + tokens * token_stride + columns * column_stride
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, out_ptr, num_tokens, width,
    gate_example_stride, gate_token_stride, gate_stride, up_example_stride, up_token_stride, up_stride,
    NONLINEARITY: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    example, tokens, rows = _rows(num_tokens, BLOCK_TOKENS)
    columns = program_columns(BLOCK_COLUMNS)
    mask = (tokens < num_tokens) & (columns < width)
    gate = _load(gate_ptr, example, tokens, columns, gate_example_stride, gate_token_stride, gate_stride, mask)
    up = _load(up_ptr, example, tokens, columns, up_example_stride, up_token_stride, up_stride, mask)
    out = activate(gate, up, 1.0, 0.0, NONLINEARITY, GATED=True)
    tl.store(out_ptr + rows * width + columns, out, mask=mask)


@triton.jit
def _backward_kernel(
    gate_ptr, up_ptr, gradient_ptr, gate_gradient_ptr, up_gradient_ptr, num_tokens, width,
    gate_example_stride, gate_token_stride, gate_stride, up_example_stride, up_token_stride, up_stride,
    gradient_example_stride, gradient_token_stride, gradient_stride,
    NONLINEARITY: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    example, tokens, rows = _rows(num_tokens, BLOCK_TOKENS)
    columns = program_columns(BLOCK_COLUMNS)
    mask = (tokens < num_tokens) & (columns < width)
    gate = _load(gate_ptr, example, tokens, columns, gate_example_stride, gate_token_stride, gate_stride, mask)
    up = _load(up_ptr, example, tokens, columns, up_example_stride, up_token_stride, up_stride, mask)
    gradient = _load(
        gradient_ptr, example, tokens, columns, gradient_example_stride, gradient_token_stride, gradient_stride, mask
    )
    _, of_gate, of_up = activate_backward(gate, up, gradient, 1.0, 0.0, NONLINEARITY, GATED=True)
    places = rows * width + columns
    if gate_gradient_ptr is not None:
        tl.store(gate_gradient_ptr + places, of_gate, mask=mask)
    if up_gradient_ptr is not None:
        tl.store(up_gradient_ptr + places, of_up, mask=mask)


def _launch(kernel: Any, *tensors: torch.Tensor | None, read: tuple[torch.Tensor, ...], nonlinearity: Nonlinearity) -> None:
    """Launch a kernel over the elements of `read`, the tensors that are read by their strides."""
    batch_size, num_tokens, width = read[0].shape
    block_tokens, block_columns = BLOCK
    kernel[(batch_size * triton.cdiv(num_tokens, block_tokens), triton.cdiv(width, block_columns))](
        *read, *tensors, num_tokens, width, *(stride for tensor in read for stride in tensor.stride()),
        NONLINEARITY=nonlinearity, BLOCK_TOKENS=block_tokens, BLOCK_COLUMNS=block_columns,
    )  # fmt: skip


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, nonlinearity: Nonlinearity) -> torch.Tensor:
        out = gate.new_empty(gate.shape)
        _launch(_forward_kernel, out, read=(gate, up), nonlinearity=nonlinearity)
        ctx.save_for_backward(gate, up)
        ctx.nonlinearity = nonlinearity
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        gradients = [gate.new_empty(gate.shape) if needed else None for needed in ctx.needs_input_grad[:2]]
        _launch(_backward_kernel, *gradients, read=(gate, up, gradient), nonlinearity=ctx.nonlinearity)
        return *gradients, None


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Multiply up by the SiLU of gate, in one kernel.

        out = silu(gate) * up,  silu(x) = x * sigmoid(x)

    Args:
        gate: [batch_size, num_tokens, intermediate_size], bfloat16, float16 or float32; any strides.
        up: [batch_size, num_tokens, intermediate_size]; same dtype, any strides.

    Returns:
        [batch_size, num_tokens, intermediate_size], dtype as gate; computed in float32 and rounded once, as is each gradient.
        Differentiable once, by both.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.gated_activations.swiglu`.
    """
    validation.swiglu(gate, up)
    return _apply(gate, up, "silu")


def geglu(gate: torch.Tensor, up: torch.Tensor, *, approximation: GeluApproximation) -> torch.Tensor:
    """Multiply up by the GELU of gate, in one kernel.

        out = gelu(gate) * up

    Args:
        gate: [batch_size, num_tokens, intermediate_size], bfloat16, float16 or float32; any strides.
        up: [batch_size, num_tokens, intermediate_size]; same dtype, any strides.
        approximation: "none" for the GELU with erf, "tanh" for the one with tanh.

    Returns:
        As `swiglu`.

    Raises:
        TypeError: An argument is not a tensor of the dtype above.
        ValueError: As `swiglu`, or approximation is another name.

    Source: `gaugeblock.reference.torch.gated_activations.geglu`.
    """
    validation.geglu(gate, up, approximation)
    return _apply(gate, up, NONLINEARITIES[approximation])


def _apply(gate: torch.Tensor, up: torch.Tensor, nonlinearity: Nonlinearity) -> torch.Tensor:
    reject_float64("gate", gate)
    require_triton_device("gate", gate)
    with device_of(gate):
        return _GatedActivation.apply(gate, up, nonlinearity)
