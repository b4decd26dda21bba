"""Experts: each token passes the feed-forward networks that its router chose; their outputs are added up.

Shapes: T num_tokens, E num_experts, K top_k, N routed rows (T * K), H hidden_size, I intermediate_size, F gate and up
together (2 * I).
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import silu

from gaugeblock.reference import validation
from gaugeblock.reference.configs import GeluApproximation
from gaugeblock.reference.torch.precision import at_least_float32


def fused_swiglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """Apply the chosen SwiGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (silu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows.
        w2: [num_experts, hidden_size, intermediate_size].
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, or an id names no expert.

    Source: the mixture is equation 1 of Shazeer et al. (arXiv:1701.06538); SwiGLU is equation 6 of Shazeer
    (arXiv:2002.05202), without biases; the layout of the weights is vLLM's.
    """
    validation.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    def swiglu_experts(hidden_NH: torch.Tensor, group_sizes_E: torch.Tensor) -> torch.Tensor:
        gate_NI, up_NI = grouped_matmul(hidden_NH, w13, group_sizes_E).chunk(2, dim=-1)
        return grouped_matmul(silu(gate_NI) * up_NI, w2, group_sizes_E)

    return sum_of_experts(swiglu_experts, hidden_states, topk_weights, topk_ids, num_experts=w13.shape[0])


def fused_geglu(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    approximate: GeluApproximation,
) -> torch.Tensor:
    """Apply the chosen GEGLU experts to each token and add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * w2[e] @ (gelu(gate) * up)
        gate, up = the halves of w13[e] @ hidden_states[t],  e = topk_ids[t, j]
        gelu(x) = x / 2 * (1 + erf(x / sqrt(2))), or x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype.
        w13: [num_experts, 2 * intermediate_size, hidden_size], gate rows, then up rows.
        w2: [num_experts, hidden_size, intermediate_size].
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.
        approximate: "none" for the GELU with erf, "tanh" for the one with tanh.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or `approximate` is another word.

    Source: GEGLU is equation 6 of Shazeer (arXiv:2002.05202), without biases; the form with tanh is that of Hendrycks and
    Gimpel (arXiv:1606.08415), section 2; otherwise as `fused_swiglu`.
    """
    validation.fused_geglu(hidden_states, w13, w2, topk_weights, topk_ids, approximate)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    def geglu_experts(hidden_NH: torch.Tensor, group_sizes_E: torch.Tensor) -> torch.Tensor:
        gate_NI, up_NI = grouped_matmul(hidden_NH, w13, group_sizes_E).chunk(2, dim=-1)
        return grouped_matmul(gelu(gate_NI, approximate) * up_NI, w2, group_sizes_E)

    return sum_of_experts(geglu_experts, hidden_states, topk_weights, topk_ids, num_experts=w13.shape[0])


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
    """Apply the chosen experts of one hidden layer, with biases and a GELU, to each token; add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * (w2[e] @ gelu(w1[e] @ hidden_states[t] + b1[e]) + b2[e])
        e = topk_ids[t, j],  gelu as in `fused_geglu`

    Args:
        hidden_states: [num_tokens, hidden_size], floating; weights and biases have its dtype.
        w1: [num_experts, intermediate_size, hidden_size].
        b1: [num_experts, intermediate_size].
        w2: [num_experts, hidden_size, intermediate_size].
        b2: [num_experts, hidden_size]; what a token gets of it is weighted too.
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.
        approximate: "none" for the GELU with erf, "tanh" for the one with tanh (GPT-2).

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or `approximate` is another word.

    Source: the feed-forward network of GPT-2 (openai/gpt-2 model.py, mlp), whose matrices are the transposed ones, as expert:
    Komatsuzaki et al. 2022, sparse upcycling (arXiv:2212.05055), section 3.
    """
    validation.fused_gelu_mlp(hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, approximate)
    validation.expert_ids_in_range(topk_ids, num_experts=w1.shape[0])

    def gelu_experts(hidden_NH: torch.Tensor, group_sizes_E: torch.Tensor) -> torch.Tensor:
        inner_NI = grouped_linear(hidden_NH, w1, b1, group_sizes_E)
        return grouped_linear(gelu(inner_NI, approximate), w2, b2, group_sizes_E)

    return sum_of_experts(gelu_experts, hidden_states, topk_weights, topk_ids, num_experts=w1.shape[0])


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
    """Apply the chosen experts of gpt-oss, with biases and clamped gates, to each token; add up their weighted outputs.

        out[t] = sum over j of topk_weights[t, j] * (w2[e] @ (gate * sigmoid(alpha * gate) * (up + 1)) + b2[e])
        gate = min(even rows, limit), up = odd rows, at least -limit and at most limit,
        of w13[e] @ hidden_states[t] + b13[e],  e = topk_ids[t, j]

    Args:
        hidden_states: [num_tokens, hidden_size], floating; weights and biases have its dtype.
        w13: [num_experts, 2 * intermediate_size, hidden_size], rows of gate and up in turn, beginning with gate. Checkpoints
            of transformers hold [num_experts, hidden_size, 2 * intermediate_size]: give `.mT` of it.
        b13: [num_experts, 2 * intermediate_size], in the same order.
        w2: [num_experts, hidden_size, intermediate_size].
        b2: [num_experts, hidden_size]; what a token gets of it is weighted too.
        topk_weights: [num_tokens, top_k], floating, usually float32.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1. An id that comes twice counts twice.
        alpha: How steep the sigmoid is; 1.702 in gpt-oss.
        limit: Above 0; 7 in gpt-oss.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or an option is no number.
        ValueError: Ranks, sizes or devices do not fit together, an id names no expert, or an option is not finite or, of
            `limit`, not positive.

    Source: openai/gpt-oss, gpt_oss/torch/model.py, swiglu and MLPBlock.
    """
    validation.fused_swiglu_oai(hidden_states, w13, b13, w2, b2, topk_weights, topk_ids, alpha, limit)
    validation.expert_ids_in_range(topk_ids, num_experts=w13.shape[0])

    def swiglu_oai_experts(hidden_NH: torch.Tensor, group_sizes_E: torch.Tensor) -> torch.Tensor:
        gate_up_NF = grouped_linear(hidden_NH, w13, b13, group_sizes_E)
        return grouped_linear(clamped_swiglu(gate_up_NF, alpha=alpha, limit=limit), w2, b2, group_sizes_E)

    return sum_of_experts(swiglu_oai_experts, hidden_states, topk_weights, topk_ids, num_experts=w13.shape[0])


def shared_swiglu(hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Apply the SwiGLU expert that all tokens pass, beside those that a router chooses; its output is added to theirs.

        out[t] = w2 @ (silu(gate) * up),  gate, up = the halves of w13 @ hidden_states[t]

    Args:
        hidden_states: [num_tokens, hidden_size], floating; w13 and w2 have its dtype.
        w13: [2 * intermediate_size, hidden_size], gate rows, then up rows. Several shared experts are one, as wide as they
            are together.
        w2: [hidden_size, intermediate_size].

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together.

    Source: DeepSeekMoE (arXiv:2401.06066) section 3.2, equation 9; SwiGLU as in `fused_swiglu`.
    """
    validation.shared_swiglu(hidden_states, w13, w2)
    out_TH = swiglu(at_least_float32(hidden_states), at_least_float32(w13), at_least_float32(w2))
    return out_TH.to(hidden_states.dtype)


def gated_shared_swiglu(
    hidden_states: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, shared_gate: torch.Tensor
) -> torch.Tensor:
    """Apply the SwiGLU expert that all tokens pass, as far as a gate of each token is open.

        out[t] = sigmoid(shared_gate @ hidden_states[t]) * shared_swiglu(hidden_states, w13, w2)[t]

    Args:
        hidden_states: [num_tokens, hidden_size], floating; the weights have its dtype.
        w13: [2 * intermediate_size, hidden_size], gate rows, then up rows.
        w2: [hidden_size, intermediate_size].
        shared_gate: [1, hidden_size].

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together.

    Source: Qwen2-MoE (Qwen2MoeSparseMoeBlock of transformers).
    """
    validation.gated_shared_swiglu(hidden_states, w13, w2, shared_gate)
    hidden_TH = at_least_float32(hidden_states)
    open_T1 = torch.sigmoid(hidden_TH @ at_least_float32(shared_gate).mT)
    out_TH = open_T1 * swiglu(hidden_TH, at_least_float32(w13), at_least_float32(w2))
    return out_TH.to(hidden_states.dtype)


def gelu(x: torch.Tensor, approximate: GeluApproximation) -> torch.Tensor:
    """Return x times the normal distribution's cumulative function at x, or an approximation of that; dtype as x.

    1 + erf and 1 + tanh lose all their digits where x is below -6; erfc, and the sigmoid of twice what tanh gets, lose none.
    """
    if approximate == "tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x / 2 * torch.special.erfc(-x / math.sqrt(2))


def clamped_swiglu(gate_up: torch.Tensor, *, alpha: float, limit: float) -> torch.Tensor:
    """Return the activation of gpt-oss, `fused_swiglu_oai`, of rows that hold gate and up in turn."""
    gate_NI, up_NI = gate_up[..., 0::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate_NI * torch.sigmoid(alpha * gate_NI) * (up_NI + 1)


def swiglu(rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Return w2 @ (silu(gate) * up) of each row, gate and up being the halves of w13 @ row."""
    gate_TI, up_TI = (rows @ w13.mT).chunk(2, dim=-1)
    return (silu(gate_TI) * up_TI) @ w2.mT


def sum_of_experts(
    experts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    num_experts: int,
) -> torch.Tensor:
    """Give each expert the tokens that chose it, and add up what the experts of a token return, weighted.

        out[t] = sum over j of topk_weights[t, j] * experts(hidden_states)[t, e],  e = topk_ids[t, j]

    Args:
        experts: From rows [num_rows, hidden_size] of at least float32, sorted by expert, and how many each expert has,
            [num_experts], to what the experts make of them, [num_rows, hidden_size].
        hidden_states: [num_tokens, hidden_size], floating.
        topk_weights: [num_tokens, top_k], floating.
        topk_ids: [num_tokens, top_k], integer in 0..num_experts - 1.
        num_experts: Of which the ids name some.

    Returns:
        [num_tokens, hidden_size], dtype as hidden_states; rounded once.
    """
    expert_N = topk_ids.flatten()
    order_N = expert_N.argsort(stable=True)
    group_sizes_E = expert_N.bincount(minlength=num_experts)

    hidden_NH = at_least_float32(hidden_states).repeat_interleave(topk_ids.shape[1], dim=0)[order_N]
    out_NH = experts(hidden_NH, group_sizes_E)
    out_TKH = out_NH[order_N.argsort()].reshape(*topk_ids.shape, hidden_states.shape[1])
    out_TH = (at_least_float32(topk_weights)[..., None] * out_TKH).sum(dim=1)
    return out_TH.to(hidden_states.dtype)


def grouped_matmul(rows: torch.Tensor, weights: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """Multiply the first group of rows by the first matrix, the next group by the next, and so on.

        out[n] = weights[g] @ rows[n],  g = the group that row n lies in

    Args:
        rows: [num_rows, in_features], floating, sorted by group.
        weights: [num_groups, out_features, in_features], floating.
        group_sizes: [num_groups], integer, sums to num_rows.

    Returns:
        [num_rows, out_features], dtype of rows.
    """
    # unbind: autograd of `weights[g]` would allocate and add a gradient of all groups for every group
    groups = zip(rows.split(group_sizes.tolist()), weights.unbind(), strict=True)
    return torch.cat([rows_g @ at_least_float32(weight_g).mT for rows_g, weight_g in groups])


def grouped_linear(rows: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, group_sizes: torch.Tensor) -> torch.Tensor:
    """As `grouped_matmul`, with a bias of each group, [num_groups, out_features], added."""
    groups = zip(rows.split(group_sizes.tolist()), weights.unbind(), biases.unbind(), strict=True)
    return torch.cat([rows_g @ at_least_float32(weight_g).mT + at_least_float32(bias_g) for rows_g, weight_g, bias_g in groups])
