"""Experts in PyTorch, scheduled for a CPU (`expert_passes.py`): the activation and the biases are what differs."""

import torch

from gaugeblock.optimized.compiled.expert_activations import ClampedGated, Gated, Plain, Swish, gelu
from gaugeblock.optimized.compiled.expert_passes import Weights, sum_of_experts
from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype. Any strides.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows.
        w2: [num_experts, hidden_size, intermediate_size].
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.
        out_dtype: Of the result; None for that of hidden_states. A layer that adds more to it takes float32.

    Returns:
        [num_tokens, hidden_size], of `out_dtype`; computed in float32 (float64 for float64 inputs)
        and rounded once, as is each gradient. Differentiable once, by every floating argument.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or an id names no expert.

    Source: `gaugeblock.reference.torch.experts.fused_swiglu`.
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    weights = Weights(w13, None, w2, None)
    return sum_of_experts(Gated(Swish()), hidden_states, weights, topk_weights, topk_ids, out_dtype=out_dtype)


def fused_geglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: GeluApproximation,
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.experts.fused_geglu`, whose formula, arguments and errors these are.

    Each gradient is rounded once too. Differentiable once, by every floating argument; any strides.
    """
    validation.fused_geglu(hidden_states, w13, w2, topk_weights, topk_ids, approximate)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    weights = Weights(w13, None, w2, None)
    return sum_of_experts(Gated(gelu(approximate)), hidden_states, weights, topk_weights, topk_ids)


def fused_gelu_mlp(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: GeluApproximation,
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.experts.fused_gelu_mlp`, whose formula, arguments and errors these are.

    Each gradient is rounded once too. Differentiable once, by every floating argument; any strides.
    """
    validation.fused_gelu_mlp(hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, approximate)
    validation.expert_ids_in_range(topk_ids, num_experts=w1.shape[0])
    return sum_of_experts(Plain(gelu(approximate)), hidden_states, Weights(w1, b1, w2, b2), topk_weights, topk_ids)


def fused_swiglu_oai(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    b13: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.experts.fused_swiglu_oai`, whose formula, arguments and errors these are.

    Each gradient is rounded once too. Differentiable once, by every floating argument; any strides.
    """
    validation.fused_swiglu_oai(hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, alpha, limit)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])
    activation = ClampedGated(Swish(alpha), limit)
    return sum_of_experts(activation, hidden_states, Weights(w13, b13, w2, b2), topk_weights, topk_ids)
