"""MoE layers in JAX: the router compiled, the experts grouped."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.optimized.jax.experts import fused_swiglu
from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.routers import softmax_topk


def mixtral_moe(
    hidden_states: jax.Array, state: Mapping[str, jax.Array], *, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Send each token through the `top_k` SwiGLU experts that a linear router gives the highest probability.

        router_logits = hidden_states @ gate.weight.T
        topk_weights, topk_ids = softmax_topk(router_logits), renormalized
        out = fused_swiglu(hidden_states, experts.gate_up_proj, experts.down_proj, topk_weights, topk_ids)

    Router and experts are compiled apart: outside of jit on the CPU, how many rows the experts are padded to is
    decided by the ids, and every new number is a compilation.

    Args: as of `gaugeblock.reference.jax.moe_layers.mixtral_moe`.

    Returns: as it.

    Raises: as it.

    Source: Mixtral of Experts (arXiv:2401.04088), section 2.1; names of `state` as in transformers 5.
    """
    validation.mixtral_moe(hidden_states, state, top_k)
    logits_TE, weights_TK, ids_TK = _route(hidden_states, state["gate.weight"], top_k=top_k)
    w13, w2 = state["experts.gate_up_proj"], state["experts.down_proj"]
    return fused_swiglu(hidden_states, w13, w2, weights_TK, ids_TK), logits_TE, ids_TK


@jax.jit(static_argnames="top_k")
def _route(hidden_states: jax.Array, gate: jax.Array, *, top_k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return router_logits, topk_weights and topk_ids."""
    logits_TE = jnp.matmul(at_least_float32(hidden_states), at_least_float32(gate).mT, precision="highest")
    return logits_TE, *softmax_topk(logits_TE, top_k=top_k, renormalize=True)
