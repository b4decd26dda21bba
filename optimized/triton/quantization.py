"""Tokens quantized to e4m3 in groups of columns: one kernel, which reads each element and writes its eight bits once.

It is bound by memory. A program has some tokens and one group of each, which it reads for the largest element and again, from
cache, for the quotients. The bits of e4m3 are made by arithmetic on integers, the same on every chip: conversions are
instructions from sm_89 on only, and of another format on gfx942.
"""

import torch
import triton
import triton.language as tl

from gaugeblock.optimized.triton.arithmetic import divide
from gaugeblock.optimized.triton.launch import device_of, program_rows, reject_float64, require_triton_device
from gaugeblock.reference import validation

ELEMENTS = 2048  # of a program's block, 16 for each thread of four warps
MOST_COLUMNS = 1024  # of a block


@triton.jit
def e4m3_bits(x):
    """Return the eight bits of float32 numbers rounded to float8_e4m3fn, ties to even; of at most 448, or NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # 20 of 23 bits are rounded off; a carry moves on to the exponent, whose bias is 127 here and 7 there
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 numbers lie 2^-9 apart, as they do in float32 between 2^14 and 2^15
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True)  # 2^14 has no bit among the last eight
    rounded = tl.where(magnitude < 0x3C800000, small, normal)
    return (sign | tl.where(magnitude > 0x7F800000, 0x7F, rounded)).to(tl.uint8)


@triton.jit
def from_e4m3_bits(bits):
    """Return the numbers of float8_e4m3fn that have these eight bits, in float16, where each is exact."""
    wide = bits.to(tl.uint16)
    magnitude = wide & 0x7F
    # the exponent's four bits become the last of five, whose bias is 15 and not 7
    number = (((wide & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), number)


@triton.jit
def _quantize_kernel(
    hidden_ptr, quantized_ptr, scales_ptr,
    num_tokens, hidden_size, group_size, num_groups, token_stride, hidden_stride,
    BLOCK_TOKENS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    tokens = program_rows(BLOCK_TOKENS)[:, None]
    group = tl.program_id(1).to(tl.int64)
    exists = tokens < num_tokens
    first = group * group_size
    end = tl.minimum(first + group_size, hidden_size)
    hidden_ptrs = hidden_ptr + tokens * token_stride

    largest = tl.full([BLOCK_TOKENS, BLOCK_COLUMNS], 0.0, tl.float32)
    for start in range(first, end, BLOCK_COLUMNS):
        columns = (start + tl.arange(0, BLOCK_COLUMNS))[None, :]
        mask = exists & (columns < end)
        magnitude = tl.abs(tl.load(hidden_ptrs + columns * hidden_stride, mask=mask, other=0.0))
        largest = tl.maximum(largest, magnitude, propagate_nan=tl.PropagateNan.ALL)
    has_nan = tl.max((largest != largest).to(tl.int32), axis=1)[:, None] != 0
    most = tl.max(tl.where(largest != largest, 0.0, largest), axis=1)[:, None]
    scale = divide(tl.where(has_nan, float("nan"), most), tl.full([BLOCK_TOKENS, 1], 448.0, tl.float32))
    tl.store(scales_ptr + tokens * num_groups + group, scale, mask=exists)
    divisor = tl.where(scale == 0, 1.0, scale)

    for start in range(first, end, BLOCK_COLUMNS):
        columns = (start + tl.arange(0, BLOCK_COLUMNS))[None, :]
        mask = exists & (columns < end)
        hidden = tl.load(hidden_ptrs + columns * hidden_stride, mask=mask, other=0.0).to(tl.float32)
        quotient = divide(hidden, divisor)
        tl.store(quantized_ptr + tokens * hidden_size + columns, e4m3_bits(quotient), mask=mask)


def quantize_token_groups(hidden_states: torch.Tensor, *, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token in groups of columns, the largest element of a group to 448, the largest of e4m3.

        scales[t, c] = max over h of abs(hidden_states[t, h]) / 448,  h in group c: c * group_size and following
        quantized[t, h] = e4m3(hidden_states[t, h] / scales[t, c]), or 0 if the scale is 0

    Any strides will do.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32.
        group_size: Columns of a group, at least 1; the last one may have fewer.

    Returns:
        quantized: [num_tokens, hidden_size] float8_e4m3fn, rounded to nearest, ties to even.
        scales: [num_tokens, ceil(hidden_size / group_size)] float32.

    Raises:
        TypeError: hidden_states is not a tensor of the dtype above, or group_size no integer.
        ValueError: hidden_states has another rank, group_size is below 1, or Triton cannot run on the device.

    Source: `gaugeblock.reference.torch.quantization.quantize_token_groups`.
    """
    validation.quantize_token_groups(hidden_states, group_size)
    reject_float64("hidden_states", hidden_states)
    require_triton_device("hidden_states", hidden_states)
    num_tokens, hidden_size = hidden_states.shape
    num_groups = triton.cdiv(hidden_size, group_size)
    quantized = hidden_states.new_empty(num_tokens, hidden_size, dtype=torch.float8_e4m3fn)
    scales = hidden_states.new_empty(num_tokens, num_groups, dtype=torch.float32)
    columns = min(triton.next_power_of_2(group_size), MOST_COLUMNS)
    tokens = ELEMENTS // columns
    with device_of(hidden_states):
        _quantize_kernel[(triton.cdiv(num_tokens, tokens), num_groups)](
            hidden_states, quantized.view(torch.uint8), scales,
            num_tokens, hidden_size, group_size, num_groups, *hidden_states.stride(),
            BLOCK_TOKENS=tokens, BLOCK_COLUMNS=columns,
        )  # fmt: skip
    return quantized, scales
