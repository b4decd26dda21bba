"""MoE layers whose routers weigh what experts are given, not what they return: Llama 4's.

Shapes: T num_tokens, E num_experts, K top_k, H hidden_size.
"""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.jax.experts import shared_swiglu
from gaugeblock.reference.jax.moe_building import input_scaled_swiglu
from gaugeblock.reference.jax.moe_layers import router_logits, shared_weights
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.routers import sigmoid_input_scaling


def llama4_moe(hidden_states: jax.Array, state: Mapping[str, jax.Array], *, top_k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.input_scaled_moe_layers.llama4_moe`, but topk_ids are int32."""
    validation.llama4_moe(hidden_states, state, top_k)

    hidden_TH, state = at_least_float32(hidden_states), {name: at_least_float32(each) for name, each in state.items()}
    logits_TE = router_logits(hidden_TH, state["router.weight"])
    weights_TK, ids_TK = sigmoid_input_scaling(logits_TE, top_k=top_k)
    w13, w2 = state["experts.gate_up_proj"].mT, state["experts.down_proj"].mT
    out_TH = input_scaled_swiglu(hidden_TH, w13, w2, weights_TK, ids_TK)
    out_TH = out_TH + shared_swiglu(hidden_TH, *shared_weights(state, "shared_expert"))
    return out_TH.astype(hidden_states.dtype), logits_TE, ids_TK
