"""MoE layers composed of routers and experts, which another module brings: kernels, CPU schedules, or experts on many ranks.

What a realm brings is a namespace of functions by the names of the operations. Experts take `out_dtype`, so that what is added to
their sums is added before it is rounded.
"""

from collections.abc import Mapping
from typing import Any

import torch

from gaugeblock.reference import validation

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
State = Mapping[str, torch.Tensor]


def qwen3_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int, renormalize: bool) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.qwen3_moe`, of these parts."""
    validation.mixtral_moe(hidden_states, state, top_k)
    logits = router_logits(hidden_states, state["gate.weight"])
    routing = parts.softmax_topk(logits, top_k=top_k, renormalize=renormalize)
    out = parts.fused_swiglu(hidden_states, state["experts.gate_up_proj"], state["experts.down_proj"], *routing)
    return out, logits, routing[1]


def mixtral_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.mixtral_moe`, of these parts."""
    return qwen3_moe(parts, hidden_states, state, top_k=top_k, renormalize=True)


def qwen2_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int, renormalize: bool) -> Layer:
    """As `gaugeblock.reference.torch.moe_layers.qwen2_moe`, of these parts."""
    validation.qwen2_moe(hidden_states, state, top_k)
    logits = router_logits(hidden_states, state["gate.weight"])
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


def gpt_oss_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int, alpha: float, limit: float) -> Layer:
    """As `gaugeblock.reference.torch.biased_moe_layers.gpt_oss_moe`, of these parts; matrices stay as they lie."""
    validation.gpt_oss_moe(hidden_states, state, top_k, alpha, limit)
    logits = router_logits(hidden_states, state["router.weight"]) + state["router.bias"]
    routing = parts.topk_softmax(logits, top_k=top_k)
    up = state["experts.gate_up_proj"].mT, state["experts.gate_up_proj_bias"]
    down = state["experts.down_proj"].mT, state["experts.down_proj_bias"]
    out = parts.fused_swiglu_oai(hidden_states, *up, *down, *routing, alpha=alpha, limit=limit)
    return out, logits, routing[1]


def upcycled_gpt2_moe(
    parts: Any,
    hidden_states: torch.Tensor,
    state: State,
    noise: torch.Tensor,
    *,
    top_k: int,
    noise_std: float,
    training: bool,
) -> tuple[torch.Tensor, ...]:
    """As `gaugeblock.reference.torch.biased_moe_layers.upcycled_gpt2_moe`, of these parts; matrices stay as they lie."""
    validation.upcycled_gpt2_moe(hidden_states, state, noise, top_k, noise_std)
    logits = router_logits(hidden_states, state["router.gate.weight"])
    options = {"top_k": top_k, "noise_std": noise_std, "training": training}
    topk_weights, topk_ids, probs, _, logits, entropy = parts.ste_topk(logits, noise, **options)
    up = state["experts.c_fc.weight"].mT, state["experts.c_fc.bias"]
    down = state["experts.c_proj.weight"].mT, state["experts.c_proj.bias"]
    out = parts.fused_gelu_mlp(hidden_states, *up, *down, topk_weights, topk_ids, approximate="tanh")

    counted = torch.ones(len(topk_ids), dtype=torch.bool, device=topk_ids.device)
    assignments = parts.expert_load(topk_ids, counted, num_experts=logits.shape[1])
    return out, logits, topk_ids, probs, entropy, assignments.to(logits.dtype) / max(1, topk_ids.numel())
