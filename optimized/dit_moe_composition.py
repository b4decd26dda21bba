"""The MoE layer of DiT-MoE, composed of a realm's experts and losses as `moe_composition` says, and of its `dit_moe_gate`."""

from typing import Any

import torch

from gaugeblock.optimized.moe_composition import State, accurate_dtype, router_logits, shared_weights
from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEConfig


def dit_moe(
    parts: Any, hidden_states: torch.Tensor, state: State, *, config: DiTMoEConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.dit_moe_layers.dit_moe`, of these parts."""
    validation.dit_moe(hidden_states, state, config)
    tokens = hidden_states.flatten(0, 1)
    logits = router_logits(tokens, state["gate.weight"])
    routing = parts.dit_moe_gate(logits, config)

    dtype = accurate_dtype(hidden_states)
    w13, w2, shared = state["experts.gate_up_proj"], state["experts.down_proj"], shared_weights(state, "shared_experts")
    out = parts.fused_swiglu(tokens, w13, w2, *routing, out_dtype=dtype)
    out = out + parts.shared_swiglu(tokens, *shared, out_dtype=dtype)

    batch_size, num_tokens, _ = hidden_states.shape
    logits, ids = (each.reshape(batch_size, num_tokens, each.shape[1]) for each in (logits, routing[1]))
    loss = balance_loss(parts, logits, ids, config)
    return out.to(hidden_states.dtype).reshape(hidden_states.shape), logits, ids, loss


def balance_loss(parts: Any, logits: torch.Tensor, ids: torch.Tensor, config: DiTMoEConfig) -> torch.Tensor:
    """As `gaugeblock.reference.torch.dit_moe_layers.balance_loss`, of these parts."""
    if not config.per_sample:
        logits, ids = logits.flatten(0, 1)[None], ids.flatten(0, 1)[None]
    everything = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return config.aux_loss_alpha * parts.sequence_balance_loss(logits, ids, everything, scores=config.scores)
