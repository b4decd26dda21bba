"""MoE layers composed of routers and experts, which another module brings: kernels, CPU schedules, or experts on many ranks.

What a realm brings is a namespace of functions by the names of the operations, `router_logits`, and `num_holders`, among how many
ranks the experts are split (`on_one_device`). Experts take `out_dtype`, so that what is added to their sums is added before it is
rounded.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEConfig

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


def deepseek_v2_moe(
    parts: Any,
    hidden_states: torch.Tensor,
    state: State,
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> Layer:
    """As `gaugeblock.reference.torch.grouped_moe_layers.deepseek_v2_moe`, of these parts; torch divides weights."""
    validation.deepseek_v2_moe(hidden_states, state, top_k, num_groups, topk_groups, routed_scaling_factor, parts.num_holders)
    logits = parts.router_logits(hidden_states, state["gate.weight"])
    groups = {"num_groups": num_groups, "topk_groups": topk_groups}
    weights, ids = parts.grouped_softmax_topk(logits, top_k=top_k, **groups, routed_scaling_factor=1.0)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return routed_and_shared(parts, hidden_states, state, weights * routed_scaling_factor, ids), logits, ids


def deepseek_v3_moe(
    parts: Any,
    hidden_states: torch.Tensor,
    state: State,
    *,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> Layer:
    """As `gaugeblock.reference.torch.grouped_moe_layers.deepseek_v3_moe`, of these parts."""
    validation.deepseek_v3_moe(hidden_states, state, top_k, num_groups, topk_groups, routed_scaling_factor, parts.num_holders)
    logits = parts.router_logits(hidden_states, state["gate.weight"])
    weights, ids = parts.grouped_sigmoid_topk(
        logits,
        state["gate.e_score_correction_bias"],
        top_k=top_k,
        num_groups=num_groups,
        topk_groups=topk_groups,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )
    return routed_and_shared(parts, hidden_states, state, weights, ids), logits, ids


def llama4_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int) -> Layer:
    """As `gaugeblock.reference.torch.input_scaled_moe_layers.llama4_moe`, of these parts."""
    validation.llama4_moe(hidden_states, state, top_k, parts.num_holders)
    logits = parts.router_logits(hidden_states, state["router.weight"])
    routing = parts.sigmoid_input_scaling(logits, top_k=top_k)
    out = input_scaled_swiglu(parts, hidden_states, state["experts.gate_up_proj"].mT, state["experts.down_proj"].mT, *routing)
    shared = shared_weights(state, "shared_expert")
    out = out + parts.shared_swiglu(hidden_states, *shared, out_dtype=accurate_dtype(hidden_states))
    return out.to(hidden_states.dtype), logits, routing[1]


def gpt_oss_moe(parts: Any, hidden_states: torch.Tensor, state: State, *, top_k: int, alpha: float, limit: float) -> Layer:
    """As `gaugeblock.reference.torch.biased_moe_layers.gpt_oss_moe`, of these parts; matrices stay as they lie."""
    validation.gpt_oss_moe(hidden_states, state, top_k, alpha, limit, parts.num_holders)
    logits = parts.router_logits(hidden_states, state["router.weight"], state["router.bias"])
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
    validation.upcycled_gpt2_moe(hidden_states, state, noise, top_k, noise_std, parts.num_holders)
    logits = parts.router_logits(hidden_states, state["router.gate.weight"])
    options = {"top_k": top_k, "noise_std": noise_std, "training": training}
    topk_weights, topk_ids, probs, _, logits, entropy = parts.ste_topk(logits, noise, **options)
    up = state["experts.c_fc.weight"].mT, state["experts.c_fc.bias"]
    down = state["experts.c_proj.weight"].mT, state["experts.c_proj.bias"]
    out = parts.fused_gelu_mlp(hidden_states, *up, *down, topk_weights, topk_ids, approximate="tanh")
    return out, logits, topk_ids, probs, entropy, parts.load_fractions(topk_ids, logits)


def dit_moe(
    parts: Any, hidden_states: torch.Tensor, state: State, *, config: DiTMoEConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `gaugeblock.reference.torch.dit_moe_layers.dit_moe`, of these parts."""
    validation.dit_moe(hidden_states, state, config, parts.num_holders)
    tokens = hidden_states.flatten(0, 1)
    logits = parts.router_logits(tokens, state["gate.weight"])
    routing = parts.dit_moe_gate(logits, config)

    dtype = accurate_dtype(hidden_states)
    w13, w2, shared = state["experts.gate_up_proj"], state["experts.down_proj"], shared_weights(state, "shared_experts")
    out = parts.fused_swiglu(tokens, w13, w2, *routing, out_dtype=dtype)
    out = out + parts.shared_swiglu(tokens, *shared, out_dtype=dtype)

    batch_size, num_tokens, _ = hidden_states.shape
    logits, ids = (each.reshape(batch_size, num_tokens, each.shape[1]) for each in (logits, routing[1]))
    loss = parts.balance_loss(logits, ids, config)
    return out.to(hidden_states.dtype).reshape(hidden_states.shape), logits, ids, loss


def on_one_device(**parts: Callable[..., Any]) -> SimpleNamespace:
    """What a realm of one device brings: these, and the product of a router that is torch's."""
    return SimpleNamespace(num_holders=1, router_logits=router_logits, **parts)


def router_logits(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return what a linear router says of each token, [num_tokens, num_experts], in float32 at least; the product is torch's."""
    dtype = accurate_dtype(hidden_states)
    logits = hidden_states.to(dtype) @ weight.to(dtype).mT
    return logits if bias is None else logits + bias


def routed_and_shared(
    parts: Any, hidden_states: torch.Tensor, state: State, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """Return what the chosen experts and the shared ones make of the tokens, added up before it is rounded."""
    dtype = accurate_dtype(hidden_states)
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    out = parts.fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids, out_dtype=dtype)
    out = out + parts.shared_swiglu(hidden_states, *shared_weights(state, "shared_experts"), out_dtype=dtype)
    return out.to(hidden_states.dtype)


def input_scaled_swiglu(
    parts: Any,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.moe_building.input_scaled_swiglu`, of these parts, in float32 at least.

    Each routed row is a token of its own, which its weight has scaled; it is rounded to the dtype of the tokens once, as an
    operand of a product.
    """
    scaled = topk_weights[..., None] * hidden_states[:, None]  # of the wider dtype, the weights'
    rows, ids = scaled.flatten(0, 1).to(hidden_states.dtype), topk_ids.reshape(-1, 1)
    ones = torch.ones_like(ids, dtype=topk_weights.dtype)
    out = parts.fused_swiglu(rows, w13, w2, ones, ids, out_dtype=accurate_dtype(hidden_states))
    return out.view(scaled.shape).sum(1)


def shared_weights(state: State, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w13 and w2 of the expert that all tokens pass; w13 is copied together."""
    w13 = torch.cat([state[f"{prefix}.gate_proj.weight"], state[f"{prefix}.up_proj.weight"]])
    return w13, state[f"{prefix}.down_proj.weight"]


def load_fractions(expert_load: Callable[..., torch.Tensor], topk_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """As `gaugeblock.reference.torch.biased_moe_layers.load_fractions`, of those counts."""
    counted = torch.ones(len(topk_ids), dtype=torch.bool, device=topk_ids.device)
    assignments = expert_load(topk_ids, counted, num_experts=logits.shape[1])
    return assignments.to(logits.dtype) / max(1, topk_ids.numel())


def balance_loss(
    sequence_balance_loss: Callable[..., torch.Tensor], logits: torch.Tensor, ids: torch.Tensor, config: DiTMoEConfig
) -> torch.Tensor:
    """As `gaugeblock.reference.torch.dit_moe_layers.balance_loss`, of that loss of sequences."""
    if not config.per_sample:
        logits, ids = logits.flatten(0, 1)[None], ids.flatten(0, 1)[None]
    everything = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return config.aux_loss_alpha * sequence_balance_loss(logits, ids, everything, scores=config.scores)


def accurate_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
