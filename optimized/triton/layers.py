"""Residual + gate, LayerNorm and adaLN modulation in one kernel forward and two backward.

    hidden_states = residual + gate * branch
    modulated = (hidden_states - mean) * rstd * (1 + scale) + shift

All kernels are bound by memory. Forward reads residual and branch and writes both results, each once from
and to memory: the passes for mean, variance (two passes: one pass loses (mean / sigma)^2 digits) and result
find in the cache what the first of them brought, so that a row may have any width. Alone, LayerNorm +
modulation reads its input and writes its result.

Backward reads residual, branch and the gradients of both results and writes the gradients of residual and
branch, each once. It computes hidden_states again, unrounded, since branch is needed for the gradient of gate
and residual costs what the rounded hidden_states would. Kept from forward are mean and rstd, 8 bytes a token:
without them backward had four passes instead of two, and they cost 0.2 % of the traffic of 1152 bfloat16
columns. Gradients of shift, scale and gate are sums over the tokens of an example: each program writes the
sum over its tokens, and a second kernel adds these up in their order, without atomics. So every run gives
the same bits, and no example's bits depend on its batch; the sums of 32 tokens each add 6 % to the traffic.

Shapes: B batch_size, S num_tokens, D hidden_size, C chunks of tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from gaugeblock.optimized.triton.launch import device_of, reject_float64, require_triton_device
from gaugeblock.optimized.triton.partial_sums import sum_chunks
from gaugeblock.reference import validation

# Rows and columns of a program's block, for 4 warps; a row may be wider. Forward, a warp has a row, in loads of 16 bytes, so that
# sums of rows are shuffles. Backward, a program has more tokens, since it writes their sums, and a thread 8 elements; of the
# blocks with that many, (16, 64) and (16, 128) spilled on sm_80.
FORWARD_BLOCK = (4, 256)
BACKWARD_BLOCK = (32, 32)


@triton.jit
def _place(num_tokens, BLOCK_TOKENS: tl.constexpr):
    """Return the chunk of this program, counted over the batch, its example and its tokens, all int64."""
    num_chunks = tl.cdiv(num_tokens, BLOCK_TOKENS)
    chunk = tl.program_id(0)
    example = chunk // num_chunks  # of 32 bits: a GPU has no division of 64
    tokens = (chunk - example * num_chunks).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    return chunk.to(tl.int64), example.to(tl.int64), tokens[:, None]


@triton.jit
def _columns(first, BLOCK_COLUMNS: tl.constexpr):
    return (first + tl.arange(0, BLOCK_COLUMNS)[None, :]).to(tl.int64)


@triton.jit
def _load(pointers, mask):
    """Return float32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_hidden(residual_ptrs, residual_stride, branch_ptrs, branch_stride, gate_ptrs, gate_stride, columns, width, mask):
    """Return residual + gate * branch, or residual alone."""
    hidden = _load(residual_ptrs + columns * residual_stride, mask)
    if branch_ptrs is not None:
        gate = _load(gate_ptrs + columns * gate_stride, columns < width)
        hidden += gate * _load(branch_ptrs + columns * branch_stride, mask)
    return hidden


@triton.jit
def _forward_kernel(
    residual_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, hidden_ptr, modulated_ptr, means_ptr, rstds_ptr,
    num_tokens, width, eps,
    residual_example_stride, residual_token_stride, residual_stride,
    branch_example_stride, branch_token_stride, branch_stride,
    gate_example_stride, gate_stride, shift_example_stride, shift_stride, scale_example_stride, scale_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    _, example, tokens = _place(num_tokens, BLOCK_TOKENS)
    token_exists = tokens < num_tokens
    rows = example * num_tokens + tokens
    residual_ptr += example * residual_example_stride + tokens * residual_token_stride
    if branch_ptr is not None:
        branch_ptr += example * branch_example_stride + tokens * branch_token_stride
        gate_ptr += example * gate_example_stride
    shift_ptr += example * shift_example_stride
    scale_ptr += example * scale_example_stride

    total = tl.full([BLOCK_TOKENS, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        columns = _columns(first, BLOCK_COLUMNS)
        mask = token_exists & (columns < width)
        total += _load_hidden(
            residual_ptr, residual_stride, branch_ptr, branch_stride, gate_ptr, gate_stride, columns, width, mask
        )
    mean = tl.sum(total, axis=1)[:, None] / width

    squares = tl.full([BLOCK_TOKENS, BLOCK_COLUMNS], 0.0, tl.float32)
    for first in range(0, width, BLOCK_COLUMNS):
        columns = _columns(first, BLOCK_COLUMNS)
        mask = token_exists & (columns < width)
        hidden = _load_hidden(
            residual_ptr, residual_stride, branch_ptr, branch_stride, gate_ptr, gate_stride, columns, width, mask
        )
        centered = tl.where(mask, hidden - mean, 0.0)
        squares += centered * centered
    rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / width + eps)
    tl.store(means_ptr + rows, mean, mask=token_exists)
    tl.store(rstds_ptr + rows, rstd, mask=token_exists)

    for first in range(0, width, BLOCK_COLUMNS):
        columns = _columns(first, BLOCK_COLUMNS)
        exists = columns < width
        mask = token_exists & exists
        hidden = _load_hidden(
            residual_ptr, residual_stride, branch_ptr, branch_stride, gate_ptr, gate_stride, columns, width, mask
        )
        scale = _load(scale_ptr + columns * scale_stride, exists)
        shift = _load(shift_ptr + columns * shift_stride, exists)
        if hidden_ptr is not None:
            tl.store(hidden_ptr + rows * width + columns, hidden, mask=mask)
        modulated = (hidden - mean) * rstd * (1.0 + scale) + shift
        tl.store(modulated_ptr + rows * width + columns, modulated, mask=mask)


@triton.jit
def _backward_kernel(
    residual_ptr, branch_ptr, gate_ptr, scale_ptr, means_ptr, rstds_ptr, hidden_gradient_ptr, modulated_gradient_ptr,
    residual_gradient_ptr, branch_gradient_ptr, gate_sums_ptr, shift_sums_ptr, scale_sums_ptr,
    num_tokens, width,
    residual_example_stride, residual_token_stride, residual_stride,
    branch_example_stride, branch_token_stride, branch_stride,
    gate_example_stride, gate_stride, scale_example_stride, scale_stride,
    hidden_gradient_example_stride, hidden_gradient_token_stride, hidden_gradient_stride,
    modulated_gradient_example_stride, modulated_gradient_token_stride, modulated_gradient_stride,
    NEEDS_HIDDEN: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """With x = (hidden - mean) * rstd: dx = dmodulated * (1 + scale); dhidden += rstd * (dx - mean(dx) - z * mean(dx * z)).

    z is x less its own mean: a rounded mean leaves some, up to (mean / sigma) units, and a gradient may be smaller than that.
    """
    chunk, example, tokens = _place(num_tokens, BLOCK_TOKENS)
    token_exists = tokens < num_tokens
    rows = example * num_tokens + tokens
    residual_ptr += example * residual_example_stride + tokens * residual_token_stride
    if branch_ptr is not None:
        branch_ptr += example * branch_example_stride + tokens * branch_token_stride
        gate_ptr += example * gate_example_stride
    scale_ptr += example * scale_example_stride
    if hidden_gradient_ptr is not None:
        hidden_gradient_ptr += example * hidden_gradient_example_stride + tokens * hidden_gradient_token_stride
    modulated_gradient_ptr += example * modulated_gradient_example_stride + tokens * modulated_gradient_token_stride
    mean = _load(means_ptr + rows, token_exists)
    rstd = _load(rstds_ptr + rows, token_exists)

    if NEEDS_HIDDEN:
        gradient_sum = tl.full([BLOCK_TOKENS], 0.0, tl.float32)
        normalized_sum = tl.full([BLOCK_TOKENS], 0.0, tl.float32)
        product_sum = tl.full([BLOCK_TOKENS], 0.0, tl.float32)
        for first in range(0, width, BLOCK_COLUMNS):
            columns = _columns(first, BLOCK_COLUMNS)
            exists = columns < width
            mask = token_exists & exists
            hidden = _load_hidden(
                residual_ptr, residual_stride, branch_ptr, branch_stride, gate_ptr, gate_stride, columns, width, mask
            )
            normalized = tl.where(mask, (hidden - mean) * rstd, 0.0)
            gradient = _load(modulated_gradient_ptr + columns * modulated_gradient_stride, mask)
            gradient *= 1.0 + _load(scale_ptr + columns * scale_stride, exists)
            gradient_sum += tl.sum(gradient, axis=1)
            normalized_sum += tl.sum(normalized, axis=1)
            product_sum += tl.sum(gradient * normalized, axis=1)
        mean_gradient = gradient_sum[:, None] / width
        mean_normalized = normalized_sum[:, None] / width
        projection = product_sum[:, None] / width - mean_gradient * mean_normalized

    for first in range(0, width, BLOCK_COLUMNS):
        columns = _columns(first, BLOCK_COLUMNS)
        exists = columns < width
        mask = token_exists & exists
        sums = chunk * width + columns
        hidden = _load_hidden(
            residual_ptr, residual_stride, branch_ptr, branch_stride, gate_ptr, gate_stride, columns, width, mask
        )
        normalized = (hidden - mean) * rstd
        gradient = _load(modulated_gradient_ptr + columns * modulated_gradient_stride, mask)
        if shift_sums_ptr is not None:
            tl.store(shift_sums_ptr + sums, tl.sum(gradient, axis=0)[None, :], mask=exists)
        if scale_sums_ptr is not None:
            summands = tl.where(mask, gradient * normalized, 0.0)
            tl.store(scale_sums_ptr + sums, tl.sum(summands, axis=0)[None, :], mask=exists)
        if NEEDS_HIDDEN:
            gradient *= 1.0 + _load(scale_ptr + columns * scale_stride, exists)
            gradient = rstd * (gradient - mean_gradient - (normalized - mean_normalized) * projection)
            if hidden_gradient_ptr is not None:
                gradient += _load(hidden_gradient_ptr + columns * hidden_gradient_stride, mask)
            if residual_gradient_ptr is not None:
                tl.store(residual_gradient_ptr + rows * width + columns, gradient, mask=mask)
            if gate_sums_ptr is not None:
                branch = _load(branch_ptr + columns * branch_stride, mask)
                summands = tl.where(mask, gradient * branch, 0.0)
                tl.store(gate_sums_ptr + sums, tl.sum(summands, axis=0)[None, :], mask=exists)
            if branch_gradient_ptr is not None:
                gate = _load(gate_ptr + columns * gate_stride, exists)
                tl.store(branch_gradient_ptr + rows * width + columns, gradient * gate, mask=mask)


def _strides(tensor: torch.Tensor | None, rank: int) -> tuple[int, ...]:
    return tensor.stride() if tensor is not None else (0,) * rank


class _GatedResidualLayerNormModulate(torch.autograd.Function):
    """Without branch and gate, LayerNorm + modulation of `residual`, and no hidden_states."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: torch.Tensor,
        branch: torch.Tensor | None,
        gate: torch.Tensor | None,
        shift: torch.Tensor,
        scale: torch.Tensor,
        eps: float,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        batch_size, num_tokens, width = residual.shape
        modulated = residual.new_empty(residual.shape)
        hidden_states = torch.empty_like(modulated) if branch is not None else None
        means, rstds = residual.new_empty(2, batch_size, num_tokens, dtype=torch.float32)
        block_tokens, block_columns = FORWARD_BLOCK
        _forward_kernel[(batch_size * triton.cdiv(num_tokens, block_tokens),)](
            residual, branch, gate, shift, scale, hidden_states, modulated, means, rstds,
            num_tokens, width, eps,
            *residual.stride(), *_strides(branch, 3), *_strides(gate, 2), *shift.stride(), *scale.stride(),
            BLOCK_TOKENS=block_tokens, BLOCK_COLUMNS=block_columns,
        )  # fmt: skip
        ctx.save_for_backward(residual, branch, gate, scale, means, rstds)
        ctx.set_materialize_grads(False)  # a result that nobody used is not worth reading zeros
        return hidden_states, modulated

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, hidden_gradient: torch.Tensor | None, modulated_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        residual, branch, gate, scale, means, rstds = ctx.saved_tensors
        needs_residual, needs_branch, needs_gate, needs_shift, needs_scale, _ = ctx.needs_input_grad
        if modulated_gradient is None:  # only hidden_states was used
            modulated_gradient = residual.new_zeros(()).expand(residual.shape)

        batch_size, num_tokens, width = residual.shape
        block_tokens, block_columns = BACKWARD_BLOCK
        num_chunks = triton.cdiv(num_tokens, block_tokens)
        residual_gradient = residual.new_empty(residual.shape) if needs_residual else None
        branch_gradient = residual.new_empty(residual.shape) if needs_branch else None
        wanted = needs_gate, needs_shift, needs_scale
        chunks = residual.new_empty(sum(wanted), batch_size, num_chunks, width, dtype=torch.float32)
        each = iter(chunks)
        _backward_kernel[(batch_size * num_chunks,)](
            residual, branch, gate, scale, means, rstds, hidden_gradient, modulated_gradient,
            residual_gradient, branch_gradient, *(next(each) if needed else None for needed in wanted),
            num_tokens, width,
            *residual.stride(), *_strides(branch, 3), *_strides(gate, 2), *scale.stride(),
            *_strides(hidden_gradient, 3), *modulated_gradient.stride(),
            NEEDS_HIDDEN=needs_residual or needs_branch or needs_gate,
            BLOCK_TOKENS=block_tokens, BLOCK_COLUMNS=block_columns,
        )  # fmt: skip
        each = iter(sum_chunks(chunks, residual.dtype) if any(wanted) else ())
        return residual_gradient, branch_gradient, *(next(each) if needed else None for needed in wanted), None


def layer_norm_modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize each token, then scale and shift it as its example asks, in one kernel.

        out = (x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * (1 + scale) + shift

    Args:
        hidden_states: [batch_size, num_tokens, hidden_size], bfloat16, float16 or float32; any strides.
        shift: [batch_size, hidden_size]; same dtype, any strides.
        scale: [batch_size, hidden_size]; same dtype, any strides.
        eps: Added to the variance; positive.

    Returns:
        [batch_size, num_tokens, hidden_size], dtype as hidden_states; computed in float32 and rounded once, as is each
        gradient. Differentiable once, by every array.

    Raises:
        TypeError: An argument is not a tensor of the dtype above, or eps is no number.
        ValueError: Ranks, sizes or devices do not fit together, eps is not positive, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.layers.layer_norm_modulate`.
    """
    validation.layer_norm_modulate(hidden_states, shift, scale, eps)
    _, modulated = _apply("hidden_states", hidden_states, None, None, shift, scale, eps)
    return modulated


def gated_residual_layer_norm_modulate(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """End one branch of a block and begin the next, in one kernel.

        hidden_states = residual + gate * branch
        modulated = layer_norm_modulate(hidden_states, shift, scale), of the sum before it is rounded

    Args:
        residual: [batch_size, num_tokens, hidden_size], bfloat16, float16 or float32; any strides.
        branch: [batch_size, num_tokens, hidden_size]; same dtype, any strides.
        gate: [batch_size, hidden_size]; same dtype, any strides.
        shift: [batch_size, hidden_size]; same dtype, any strides.
        scale: [batch_size, hidden_size]; same dtype, any strides.
        eps: Added to the variance; positive.

    Returns:
        hidden_states, modulated: [batch_size, num_tokens, hidden_size] each, dtype as residual; each is computed in float32
        and rounded once, as is each gradient. Differentiable once, by every array.

    Raises: as `layer_norm_modulate`.

    Source: `gaugeblock.reference.torch.layers.gated_residual_layer_norm_modulate`.
    """
    validation.gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps)
    return _apply("residual", residual, branch, gate, shift, scale, eps)


def _apply(residual_name: str, residual: torch.Tensor, *arguments: Any) -> Any:
    reject_float64(residual_name, residual)
    require_triton_device(residual_name, residual)
    with device_of(residual):
        return _GatedResidualLayerNormModulate.apply(residual, *arguments)
