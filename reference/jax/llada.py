"""LLaDA: a language model that fills masked tokens in, each token seeing all others.

Parameters have the names of public checkpoints (`model.transformer.blocks.0.q_proj.weight`). Shapes: as in `decoder`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import decoder_states, states, validation
from gaugeblock.reference.configs import LLaDAConfig
from gaugeblock.reference.jax import decoder
from gaugeblock.reference.jax.block_masks import full_mask

State = Mapping[str, jax.Array]


def llada(state: State, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, config: LLaDAConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.llada.llada`."""
    validation.llada(state, input_ids, attention_mask, config=config)
    common = decoder_states.llada_as_transformers(state, config)
    is_real_BS = jnp.ones_like(input_ids, dtype=bool) if attention_mask is None else attention_mask
    mask_BST = full_mask(jnp.ones_like(is_real_BS), is_real_BS)
    decoded = decoder.decode(common, input_ids, decoder.places_from(0, input_ids), mask_BST, config=config)
    logits_BSV = decoder.logits(common, decoded, input_ids.shape[1])
    return logits_BSV.astype(common["lm_head.weight"].dtype)


def state_shapes(config: LLaDAConfig) -> states.Shapes:
    """As `gaugeblock.reference.torch.llada.state_shapes`."""
    validation.language_model_config(config, LLaDAConfig)
    return decoder_states.llada_shapes(config)
