"""SDAR: a language model that fills blocks of masked tokens in, one block after the other.

Parameters have the names of public checkpoints, which are Qwen3's and Qwen3-MoE's (`model.layers.0.self_attn.q_proj.weight`), but
for experts, which are stacked as in `moe_layers`. Shapes: as in `decoder`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import decoder_states, states, validation
from gaugeblock.reference.configs import SDARConfig, SDARMoEConfig
from gaugeblock.reference.expert_layouts import with_stacked_experts
from gaugeblock.reference.jax import decoder
from gaugeblock.reference.jax.block_masks import block_causal_mask, noisy_clean_mask, places_in_samples

State = Mapping[str, jax.Array]


def sdar(state: State, input_ids: jax.Array, *, config: SDARConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.sdar.sdar`."""
    validation.sdar(state, input_ids, config=config)
    logits_BSV = decoder.logits(state, _block_causal(state, input_ids, config), input_ids.shape[1])
    return logits_BSV.astype(state["lm_head.weight"].dtype)


def sdar_moe(state: State, input_ids: jax.Array, *, config: SDARMoEConfig) -> tuple[jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.sdar.sdar_moe`."""
    validation.sdar_moe(state, input_ids, config=config)
    decoded = _block_causal(state, input_ids, config)
    logits_BSV = decoder.logits(state, decoded, input_ids.shape[1])
    router_logits_LBSE = jnp.stack(decoded.router_logits).reshape(config.num_hidden_layers, *input_ids.shape, config.num_experts)
    return logits_BSV.astype(state["lm_head.weight"].dtype), router_logits_LBSE


def sdar_cached(
    state: State,
    input_ids: jax.Array,
    past_keys: jax.Array,
    past_values: jax.Array,
    *,
    config: SDARConfig | SDARMoEConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.sdar.sdar_cached`."""
    validation.sdar_cached(state, input_ids, past_keys, past_values, config=config)
    first, num_tokens = past_keys.shape[3], input_ids.shape[1]
    places_BS = decoder.places_from(first, input_ids)
    key_places_T = jnp.arange(first + num_tokens)
    mask_BST = block_causal_mask(key_places_T[None, first:], key_places_T[None], block_length=config.block_length)
    decoded = decoder.decode(state, input_ids, places_BS, mask_BST, (past_keys, past_values), config=config)
    logits_BSV, dtype = decoder.logits(state, decoded, num_tokens), past_keys.dtype
    return logits_BSV.astype(dtype), decoded.keys.astype(dtype), decoded.values.astype(dtype)


def sdar_training(
    state: State,
    noisy_ids: jax.Array,
    clean_ids: jax.Array,
    sample_ids: jax.Array,
    *,
    config: SDARConfig | SDARMoEConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.sdar.sdar_training`."""
    validation.sdar_training(state, noisy_ids, clean_ids, sample_ids, config=config)
    input_ids = jnp.concatenate([noisy_ids, clean_ids], axis=1)
    places_BS = jnp.tile(places_in_samples(sample_ids), (1, 2))
    mask_BST = noisy_clean_mask(sample_ids, block_length=config.block_length)
    decoded = decoder.decode(state, input_ids, places_BS, mask_BST, config=config)
    logits_BSV = decoder.logits(state, decoded, noisy_ids.shape[1])
    return logits_BSV.astype(state["lm_head.weight"].dtype)


def _block_causal(state: State, input_ids: jax.Array, config: SDARConfig | SDARMoEConfig) -> decoder.Decoded:
    """Apply the layers to whole sequences [B, S]."""
    place_S = jnp.arange(input_ids.shape[1])
    mask_BST = block_causal_mask(place_S, place_S, block_length=config.block_length)[None]
    return decoder.decode(state, input_ids, decoder.places_from(0, input_ids), mask_BST, config=config)


def state_shapes(config: SDARConfig | SDARMoEConfig) -> states.Shapes:
    """As `gaugeblock.reference.torch.sdar.state_shapes`."""
    validation.language_model_config(config, SDARConfig, SDARMoEConfig)
    return decoder_states.state_shapes(config)


def load_state(state: State, *, config: SDARConfig | SDARMoEConfig) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.sdar.load_state`."""
    if isinstance(config, SDARMoEConfig):
        for index in range(config.num_hidden_layers):
            state = with_stacked_experts(state, f"model.layers.{index}.mlp.experts.", config.num_experts)
    shapes = state_shapes(config)
    validation.state_entries(state, shapes)
    return {name: state[name] for name in shapes}
