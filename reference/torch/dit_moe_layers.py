"""The MoE layer of DiT-MoE, a diffusion transformer.

Shapes: B batch_size, N num_tokens of each sample, T all tokens (B * N), E num_experts, K top_k, H hidden_size.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.torch.auxiliary_losses import sequence_balance_loss
from gaugeblock.reference.torch.experts import fused_swiglu, shared_swiglu
from gaugeblock.reference.torch.moe_layers import router_logits, shared_weights
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.routers import best_of_groups, divided_by_sum, is_in_best_groups


def dit_moe(
    hidden_states: torch.Tensor, state: Mapping[str, torch.Tensor], *, config: DiTMoEConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add up the `top_k` SwiGLU experts of each token that its gate scores highest, and a shared one that all tokens pass.

        router_logits = hidden_states @ gate.weight.T
        s = softmax(router_logits), or sigmoid(router_logits)
        ids = top_k(s, or -inf outside of the topk_groups groups of highest single s)
        weights = s[ids] * routed_scaling_factor                          if not renormalize
        weights = s[ids] / (sum(s[ids]) + 1e-20) * routed_scaling_factor  if renormalize
        out = fused_swiglu(hidden_states, experts, weights, ids) + shared_swiglu(hidden_states, shared_experts)
        auxiliary_loss = aux_loss_alpha * sum over e of load[e] * probability[e], of all tokens
        auxiliary_loss = mean of that over the samples, of the tokens of each  if per_sample
        load[e] = num_experts / (top_k * tokens) * assignments of expert e; no gradient
        probability[e] = mean over tokens of s[e] / sum of s

    The auxiliary loss is aux_loss_alpha where all experts have the same load. It is to be added to what is differentiated with
    the factor 1, of each layer, whatever multiplies the loss of the model: the public code returns none, and adds its gradient
    on the way back. So it is not in the loss that is reported, and a loss that is scaled, or averaged over microbatches, leaves
    it as it is. Where the sum of both is scaled or averaged, as is usual, the auxiliary loss is too: another weight than theirs.

    Args:
        hidden_states: [batch_size, num_tokens, hidden_size], floating; the entries of `state` have its dtype.
        state: `gate.weight` [num_experts, hidden_size]; `experts.gate_up_proj` [num_experts, 2 * intermediate_size, hidden_size],
            gate rows, then up rows; `experts.down_proj` [num_experts, hidden_size, intermediate_size];
            `shared_experts.gate_proj.weight` and `shared_experts.up_proj.weight` [shared_intermediate_size, hidden_size],
            `shared_experts.down_proj.weight` [hidden_size, shared_intermediate_size]. A checkpoint's experts, one by one, are
            the layout "linear" of `expert_layouts`.
        config: The options.

    Returns:
        hidden_states_out: [batch_size, num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for
            float64 inputs) and rounded once.
        router_logits: [batch_size, num_tokens, num_experts], float32 (float64 for float64 inputs).
        topk_ids: [batch_size, num_tokens, top_k], int64, by descending s; equal ones in any order. A token with a NaN logit
            gets any distinct ids.
        auxiliary_loss: [], dtype as router_logits; 0 where there are no tokens.

    Raises:
        TypeError: An array is not of the dtype above, `state` is not a dict of arrays, or `config` not a DiTMoEConfig.
        ValueError: Ranks, sizes or devices do not fit together, `state` lacks an entry or has one too many, groups do not
            divide the experts, or there are less than `top_k` experts to choose from.

    Source: Fei et al. 2024 (arXiv:2407.11633), section 2; `SparseMoeBlock` of feizc/DiT-MoE models.py.
    """
    validation.dit_moe(hidden_states, state, config)

    hidden_TH, state = (
        at_least_float32(hidden_states).flatten(0, 1),
        {name: at_least_float32(each) for name, each in state.items()},
    )
    logits_TE = router_logits(hidden_TH, state["gate.weight"])
    weights_TK, ids_TK = gate(logits_TE, config)
    out_TH = fused_swiglu(hidden_TH, state["experts.gate_up_proj"], state["experts.down_proj"], weights_TK, ids_TK)
    out_TH = out_TH + shared_swiglu(hidden_TH, *shared_weights(state, "shared_experts"))

    batch_size, num_tokens, _ = hidden_states.shape
    logits_BNE, ids_BNK = (each.reshape(batch_size, num_tokens, each.shape[1]) for each in (logits_TE, ids_TK))
    auxiliary_loss = balance_loss(logits_BNE, ids_BNK, config)
    return out_TH.to(hidden_states.dtype).reshape(hidden_states.shape), logits_BNE, ids_BNK, auxiliary_loss


def gate(router_logits: torch.Tensor, config: DiTMoEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and ids of the experts of each token, both [all tokens, top_k], of logits in float32 at least."""
    scores_TE = torch.sigmoid(router_logits) if config.scores == "sigmoid" else torch.softmax(router_logits, dim=-1)
    kept_TE = is_in_best_groups(best_of_groups(scores_TE, config.num_groups, 1), config.topk_groups, scores_TE.shape[1])
    ids_TK = torch.topk(scores_TE.masked_fill(~kept_TE, -torch.inf), config.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    if config.renormalize:
        weights_TK = divided_by_sum(weights_TK)
    return weights_TK * config.routed_scaling_factor, ids_TK


def balance_loss(router_logits: torch.Tensor, topk_ids: torch.Tensor, config: DiTMoEConfig) -> torch.Tensor:
    """Return the auxiliary loss of samples, or of all of them as one."""
    logits_BNE, ids_BNK = router_logits, topk_ids
    if not config.per_sample:
        logits_BNE, ids_BNK = (each.flatten(0, 1)[None] for each in (router_logits, topk_ids))
    everything_BN = torch.ones(logits_BNE.shape[:2], dtype=torch.bool, device=logits_BNE.device)
    return config.aux_loss_alpha * sequence_balance_loss(logits_BNE, ids_BNK, everything_BN, scores=config.scores)
