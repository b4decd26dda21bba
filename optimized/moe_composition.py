"""MoE layers composed of routers and experts, which another module brings: kernels, CPU schedules, or experts on many ranks.

What a realm brings is a namespace of functions by the names of the operations, `router_logits`, and `num_holders`, among how many
ranks the experts are split. Experts take `out_dtype`, so that what is added to their sums is added before it is rounded.
"""

from collections.abc import Mapping
from typing import Any

import torch

from gaugeblock.reference import validation

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
State = Mapping[str, torch.Tensor]


def qwen3_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int, renormalize: bool) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.qwen3_moe`, of these parts."""
    validation.mixtral_moe(hidden_states, state, top_k, parts.num_holders)
    logits = parts.router_logits(hidden_states, state["gate.weight"])
    routing = parts.softmax_topk(logits, top_k=top_k, renormalize=renormalize)
    out = parts.fused_swiglu(hidden_states, state["experts.gate_up_proj"], state["experts.down_proj"], *routing)
    return out, logits, routing[1]


def mixtral_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.mixtral_moe`, of these parts."""
    return qwen3_moe(parts, hidden_states, state, top_k=top_k, renormalize=True)


def qwen2_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int, renormalize: bool) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.qwen2_moe`, of these parts."""
    validation.qwen2_moe(hidden_states, state, top_k, parts.num_holders)
    logits = parts.router_logits(hidden_states, state["gate.weight"])
    routing = parts.softmax_topk(logits, top_k=top_k, renormalize=renormalize)

    dtype = accurate_dtype(hidden_states)
    w13, w2, shared = state["experts.gate_up_proj"], state["experts.down_proj"], shared_weights(state, "shared_expert")
    out = parts.fused_swiglu(hidden_states, w13, w2, *routing, out_dtype=dtype)
    out = out + parts.gated_shared_swiglu(hidden_states, *shared, state["shared_expert_gate.weight"], out_dtype=dtype)
    return out.to(hidden_states.dtype), logits, routing[1]


def router_logits(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what a linear router says of each token, [num_tokens, num_experts], in float32 at least; the product is torch's."""
    dtype = accurate_dtype(hidden_states)
    return hidden_states.to(dtype) @ weight.to(dtype).mT


def shared_weights(state: State, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w13 and w2 of the expert that all tokens pass; w13 is copied together."""
    w13 = torch.cat([state[f"{prefix}.gate_proj.weight"], state[f"{prefix}.up_proj.weight"]])
    return w13, state[f"{prefix}.down_proj.weight"]


def accurate_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
