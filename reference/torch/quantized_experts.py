"""Experts whose weights are held in eight bits, beside scales.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size, I intermediate_size, F gate and up
together (2 * I).
"""

import torch
from torch.nn.functional import silu

from gaugeblock.reference import validation
from gaugeblock.reference.torch.experts import grouped_matmul, sum_of_experts
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.quantization import dequantize_blocks, quantized_and_back


def fused_swiglu_int8(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts, whose weights are integers with a scale for each row, to each token; add up their
    weighted outputs.

        out = experts.fused_swiglu(hidden_states, w13_scales[..., None] * w13, w2_scales[..., None] * w2, topk_weights, topk_ids)

    Only weights are quantized, tokens are not; gradients go to hidden_states and topk_weights.

    Args:
        hidden_states: [num_tokens, hidden_size], floating.
        w13: [num_experts, 2 * intermediate_size, hidden_size], int8, gate rows, then up rows.
        w13_scales: [num_experts, 2 * intermediate_size], floating, usually float32: what a 1 in this row stands for.
        w2: [num_experts, hidden_size, intermediate_size], int8.
        w2_scales: [num_experts, hidden_size], floating, usually float32.
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or an id names no expert.

    Source: Dettmers et al. 2022 (arXiv:2208.07339) section 2.1, row-wise absmax quantization, of weights alone; the layout is
    that of vLLM's fused_experts with use_int8_w8a16.
    """
    validation.fused_swiglu_int8(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    hidden_TH = at_least_float32(hidden_states)
    w13_EFH = w13_scales.to(hidden_TH.dtype)[..., None] * w13
    w2_EHI = w2_scales.to(hidden_TH.dtype)[..., None] * w2

    def int8_experts(hidden_NH: torch.Tensor, group_sizes_E: torch.Tensor) -> torch.Tensor:
        gate_NI, up_NI = grouped_matmul(hidden_NH, w13_EFH, group_sizes_E).chunk(2, dim=-1)
        return grouped_matmul(silu(gate_NI) * up_NI, w2_EHI, group_sizes_E)

    out_TH = sum_of_experts(int8_experts, hidden_TH, topk_weights, topk_ids, num_experts=w13.shape[0])
    return out_TH.to(hidden_states.dtype)


def fused_swiglu_fp8(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scales: torch.Tensor,
    w2: torch.Tensor,
    w2_scales: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    block_size: int,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts to each token, all in e4m3: weights in blocks that have a scale each, tokens and
    activations quantized in groups of as many columns; add up the experts' weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2'[e] @ q(silu(gate) * up)
        gate, up = the halves of w13'[e] @ q(hidden_states[t]),  e = topk_ids[t, j]
        w'[r, c] = w[r, c] * scales[r // block_size, c // block_size],  q: `quantization.quantize_token_groups` and back

    For inference: nothing has a gradient.

    Args:
        hidden_states: [num_tokens, hidden_size], floating.
        w13: [num_experts, 2 * intermediate_size, hidden_size], float8_e4m3fn, gate rows, then up rows.
        w13_scales: [num_experts, ceil(2 * intermediate_size / block_size), ceil(hidden_size / block_size)], floating, usually
            float32 (`weight_scale_inv` of DeepSeek-V3's checkpoints). Blocks are counted over gate and up rows together.
        w2: [num_experts, hidden_size, intermediate_size], float8_e4m3fn.
        w2_scales: [num_experts, ceil(hidden_size / block_size), ceil(intermediate_size / block_size)], floating.
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.
        block_size: Rows and columns of a block, columns of a group; 128 in DeepSeek-V3. The last ones may have fewer.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs), rounded to e4m3
        twice on the way, and once at the end.

    Raises:
        TypeError: An argument is not an array of the dtype above, or block_size no integer.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or block_size is below 1.

    Source: DeepSeek-V3 Technical Report (arXiv:2412.19437) section 3.3.2 and figure 7.
    """
    validation.fused_swiglu_fp8(hidden_states, w13, w13_scales, w2, w2_scales, topk_weights, topk_ids, block_size)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    hidden_TH = at_least_float32(hidden_states)
    w13_EFH = dequantize_blocks(w13, w13_scales.to(hidden_TH.dtype), block_size)
    w2_EHI = dequantize_blocks(w2, w2_scales.to(hidden_TH.dtype), block_size)

    def fp8_experts(hidden_NH: torch.Tensor, group_sizes_E: torch.Tensor) -> torch.Tensor:
        gate_up_NF = grouped_matmul(quantized_and_back(hidden_NH, block_size), w13_EFH, group_sizes_E)
        gate_NI, up_NI = gate_up_NF.chunk(2, dim=-1)
        return grouped_matmul(quantized_and_back(silu(gate_NI) * up_NI, block_size), w2_EHI, group_sizes_E)

    out_TH = sum_of_experts(fp8_experts, hidden_TH, topk_weights, topk_ids, num_experts=w13.shape[0])
    return out_TH.to(hidden_states.dtype).detach()
