"""The MoE layer of DiT-MoE, a diffusion transformer.

Shapes: B batch_size, N num_tokens of each sample, T all tokens (B * N), E num_experts, K top_k, H hidden_size.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DiTMoEConfig
from gaugeblock.reference.jax.auxiliary_losses import sequence_balance_loss
from gaugeblock.reference.jax.experts import fused_swiglu, shared_swiglu
from gaugeblock.reference.jax.moe_layers import router_logits, shared_weights
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.routers import best_of_groups, divided_by_sum, is_in_best_groups


def dit_moe(
    hidden_states: jax.Array, state: Mapping[str, jax.Array], *, config: DiTMoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.dit_moe_layers.dit_moe`, but topk_ids are int32."""
    validation.dit_moe(hidden_states, state, config)

    batch_size, num_tokens, hidden_size = hidden_states.shape
    state = {name: at_least_float32(each) for name, each in state.items()}
    hidden_TH = at_least_float32(hidden_states).reshape(batch_size * num_tokens, hidden_size)
    logits_TE = router_logits(hidden_TH, state["gate.weight"])
    weights_TK, ids_TK = gate(logits_TE, config)
    out_TH = fused_swiglu(hidden_TH, state["experts.gate_up_proj"], state["experts.down_proj"], weights_TK, ids_TK)
    out_TH = out_TH + shared_swiglu(hidden_TH, *shared_weights(state, "shared_experts"))

    logits_BNE, ids_BNK = (each.reshape(batch_size, num_tokens, each.shape[1]) for each in (logits_TE, ids_TK))
    auxiliary_loss = balance_loss(logits_BNE, ids_BNK, config)
    return out_TH.astype(hidden_states.dtype).reshape(hidden_states.shape), logits_BNE, ids_BNK, auxiliary_loss


def gate(router_logits: jax.Array, config: DiTMoEConfig) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.dit_moe_layers.gate`, but ids are int32."""
    scores_TE = jax.nn.sigmoid(router_logits) if config.scores == "sigmoid" else jax.nn.softmax(router_logits, axis=-1)
    kept_TE = is_in_best_groups(best_of_groups(scores_TE, config.num_groups, 1), config.topk_groups, scores_TE.shape[1])
    ids_TK = jax.lax.top_k(jnp.where(kept_TE, scores_TE, -jnp.inf), config.top_k)[1]
    weights_TK = jnp.take_along_axis(scores_TE, ids_TK, axis=-1)
    if config.renormalize:
        weights_TK = divided_by_sum(weights_TK)
    return weights_TK * config.routed_scaling_factor, ids_TK


def balance_loss(router_logits: jax.Array, topk_ids: jax.Array, config: DiTMoEConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.dit_moe_layers.balance_loss`."""
    logits_BNE, ids_BNK = router_logits, topk_ids
    if not config.per_sample:
        num_tokens = router_logits.shape[0] * router_logits.shape[1]
        logits_BNE, ids_BNK = (each.reshape(1, num_tokens, each.shape[2]) for each in (router_logits, topk_ids))
    everything_BN = jnp.ones(logits_BNE.shape[:2], dtype=bool)
    return config.aux_loss_alpha * sequence_balance_loss(logits_BNE, ids_BNK, everything_BN, scores=config.scores)
