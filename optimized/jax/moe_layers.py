"""MoE layers in JAX: the router compiled, the experts grouped."""

from collections.abc import Mapping

import jax

from gaugeblock.optimized.jax import moe_composition
from gaugeblock.optimized.jax.experts import sum_of_experts


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
    return moe_composition.mixtral_moe(ON_ONE_DEVICE, hidden_states, state, top_k=top_k)


ON_ONE_DEVICE = moe_composition.Parts(sum_of_experts, placed=lambda whole, of_tokens: (whole, of_tokens))
