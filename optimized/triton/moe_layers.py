"""MoE layers of the Triton routers and experts."""

from collections.abc import Mapping

import torch

from gaugeblock.optimized.triton.experts import fused_swiglu
from gaugeblock.optimized.triton.launch import require_triton_device
from gaugeblock.optimized.triton.routers import softmax_topk
from gaugeblock.reference import validation


def mixtral_moe(
    hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each token through `top_k` SwiGLU experts: `reference.torch.moe_layers.mixtral_moe`, of fused kernels.

    The product of the router is torch's, in float32; the rest is `routers.softmax_topk` and
    `experts.fused_swiglu`. Differentiable once, in hidden_states and all of `state`.

    Args:
        hidden_states: [num_tokens, hidden_size], bfloat16, float16 or float32; the entries of `state` have its dtype.
        state: `gate.weight` [num_experts, hidden_size]; `experts.gate_up_proj`
            [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows; `experts.down_proj`
            [num_experts, hidden_size, intermediate_size].
        top_k: Experts per token, 1 to num_experts.

    Returns:
        hidden_states_out: [num_tokens, hidden_size], dtype of hidden_states.
        router_logits: [num_tokens, num_experts], float32.
        topk_ids: [num_tokens, top_k], int64, by descending logit; NaN highest, of equals the lower id.

    Raises:
        TypeError: An array is not of the dtype above, or `state` is not a dict of arrays.
        ValueError: Ranks, sizes or devices do not fit together, `state` lacks an entry or has one too many,
            `top_k` is not in 1..num_experts, or Triton cannot run on the device.

    Source: Mixtral of Experts (arXiv:2401.04088), section 2.1; names of `state` as in transformers 5.
    """
    validation.mixtral_moe(hidden_states, state, top_k)
    require_triton_device("hidden_states", hidden_states)
    router_logits = hidden_states.float() @ state["gate.weight"].float().mT
    topk_weights, topk_ids = softmax_topk(router_logits, top_k=top_k, renormalize=True)
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    return fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids), router_logits, topk_ids
