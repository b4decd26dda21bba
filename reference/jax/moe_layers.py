"""MoE layers: a router and its experts in one.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size, I intermediate_size.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.experts import fused_swiglu
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.routers import softmax_topk


def mixtral_moe(
    hidden_states: jax.Array, state: Mapping[str, jax.Array], *, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.moe_layers.mixtral_moe`, but topk_ids are int32."""
    validation.mixtral_moe(hidden_states, state, top_k)

    gate_EH = at_least_float32(state["gate.weight"])
    logits_TE = jnp.matmul(at_least_float32(hidden_states), gate_EH.mT, precision="highest")
    weights_TK, ids_TK = softmax_topk(logits_TE, top_k=top_k, renormalize=True)
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    return fused_swiglu(hidden_states, w13, w2, weights_TK, ids_TK), logits_TE, ids_TK
