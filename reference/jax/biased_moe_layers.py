"""MoE layers whose experts have biases: gpt-oss', and the one that replaces an MLP of GPT-2.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size, I intermediate_size.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.auxiliary_losses import expert_load
from gaugeblock.reference.jax.experts import fused_gelu_mlp, fused_swiglu_oai
from gaugeblock.reference.jax.moe_layers import router_logits
from gaugeblock.reference.jax.noisy_routers import ste_topk
from gaugeblock.reference.jax.routers import topk_softmax


def gpt_oss_moe(
    hidden_states: jax.Array, state: Mapping[str, jax.Array], *, top_k: int, alpha: float, limit: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.biased_moe_layers.gpt_oss_moe`, but topk_ids are int32."""
    validation.gpt_oss_moe(hidden_states, state, top_k, alpha, limit)

    logits_TE = router_logits(hidden_states, state["router.weight"]) + state["router.bias"]
    weights_TK, ids_TK = topk_softmax(logits_TE, top_k=top_k)
    up = state["experts.gate_up_proj"].mT, state["experts.gate_up_proj_bias"]
    down = state["experts.down_proj"].mT, state["experts.down_proj_bias"]
    out_TH = fused_swiglu_oai(hidden_states, *up, *down, weights_TK, ids_TK, alpha=alpha, limit=limit)
    return out_TH, logits_TE, ids_TK


def upcycled_gpt2_moe(
    hidden_states: jax.Array,
    state: Mapping[str, jax.Array],
    noise: jax.Array,
    *,
    top_k: int,
    noise_std: float,
    training: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.biased_moe_layers.upcycled_gpt2_moe`, but topk_ids are int32, and noise gets zeros."""
    validation.upcycled_gpt2_moe(hidden_states, state, noise, top_k, noise_std)

    logits_TE = router_logits(hidden_states, state["router.gate.weight"])
    routing = ste_topk(logits_TE, noise, top_k=top_k, noise_std=noise_std, training=training)
    weights_TK, ids_TK, probs_TE, _, _, entropy_T = routing
    up = state["experts.c_fc.weight"].mT, state["experts.c_fc.bias"]
    down = state["experts.c_proj.weight"].mT, state["experts.c_proj.bias"]
    out_TH = fused_gelu_mlp(hidden_states, *up, *down, weights_TK, ids_TK, approximate="tanh")
    return out_TH, logits_TE, ids_TK, probs_TE, entropy_T, load_fractions(ids_TK, logits_TE)


def load_fractions(topk_ids: jax.Array, router_logits: jax.Array) -> jax.Array:
    """Return each expert's part of all assignments, [num_experts], in the dtype of the logits; 0 where there are no tokens."""
    num_tokens, num_experts = router_logits.shape
    counted_T = jnp.ones(num_tokens, dtype=bool)
    load_E = expert_load(topk_ids, counted_T, num_experts=num_experts)
    return load_E.astype(router_logits.dtype) / max(1, topk_ids.size)
