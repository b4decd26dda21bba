"""Quantization: numbers held in eight bits, beside scales that tell what they stand for.

Shapes: T num_tokens, H hidden_size, C groups of columns, G group_size.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import E4M3_MAX
from gaugeblock.reference.torch.precision import at_least_float32, through_e4m3, to_e4m3


def quantize_token_groups(hidden_states: torch.Tensor, *, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each token in groups of columns, the largest element of a group to 448, the largest of e4m3.

        scales[t, c] = max over h of abs(hidden_states[t, h]) / 448,  h in group c: c * group_size and following
        quantized[t, h] = e4m3(hidden_states[t, h] / scales[t, c]), or 0 if the scale is 0

    Args:
        hidden_states: [num_tokens, hidden_size], floating.
        group_size: Columns of a group, at least 1; the last one may have fewer.

    Returns:
        quantized: [num_tokens, hidden_size] float8_e4m3fn, rounded to nearest, ties to even. A group that has a NaN is NaN; of
            one that has an infinity, these are NaN, and all else is 0.
        scales: [num_tokens, ceil(hidden_size / group_size)] float32. (Both are float64 for float64 inputs: nothing is rounded.)

    Raises:
        TypeError: hidden_states is not an array of the dtype above, or group_size no integer.
        ValueError: hidden_states has another rank, or group_size is below 1.

    Source: DeepSeek-V3 Technical Report (arXiv:2412.19437) section 3.3.2, tiles of 1 x 128; act_quant of its inference code.
    """
    validation.quantize_token_groups(hidden_states, group_size)
    quotients_TH, scales_TC = quotients_and_scales(at_least_float32(hidden_states), group_size)
    return to_e4m3(quotients_TH), scales_TC


def quotients_and_scales(hidden_states: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `quantize_token_groups` rounds, [num_tokens, hidden_size], and the scales."""
    hidden_size = hidden_states.shape[1]
    num_groups = -(-hidden_size // group_size)
    padded = torch.nn.functional.pad(hidden_states, (0, num_groups * group_size - hidden_size))
    hidden_TCG = padded.unflatten(1, (num_groups, group_size))
    largest_TC = hidden_TCG.abs().amax(dim=-1)
    scales_TC = largest_TC / E4M3_MAX
    quotients_TCG = hidden_TCG / torch.where(scales_TC == 0, 1.0, scales_TC)[..., None]
    return quotients_TCG.flatten(1)[:, :hidden_size], scales_TC


def quantized_and_back(hidden_states: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return what the results of `quantize_token_groups` stand for, in the dtype of hidden_states, at least float32."""
    quotients_TH, scales_TC = quotients_and_scales(hidden_states, group_size)
    scales_TH = scales_TC.repeat_interleave(group_size, dim=1)[:, : hidden_states.shape[1]]
    return through_e4m3(quotients_TH) * scales_TH


def dequantize_blocks(quantized: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return matrices, each block of rows and columns times its scale.

        out[e, r, c] = quantized[e, r, c] * scales[e, r // block_size, c // block_size]

    Args:
        quantized: [num_experts, rows, columns], any dtype.
        scales: [num_experts, ceil(rows / block_size), ceil(columns / block_size)], floating.
        block_size: Rows and columns of a block; the last ones may have fewer.

    Returns:
        [num_experts, rows, columns], dtype of scales.
    """
    rows, columns = quantized.shape[1:]
    of_rows = scales.repeat_interleave(block_size, dim=1)[:, :rows]
    return quantized.to(scales.dtype) * of_rows.repeat_interleave(block_size, dim=2)[:, :, :columns]
