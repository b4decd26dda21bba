"""Dream: a language model that fills masked tokens in, each token predicted by the one before it.

Parameters have the names of public checkpoints, which are Qwen2's (`model.layers.0.self_attn.q_proj.weight`). Shapes: as in
`decoder`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import decoder_states, states, validation
from gaugeblock.reference.configs import DreamConfig
from gaugeblock.reference.jax import decoder
from gaugeblock.reference.jax.block_masks import full_mask

State = Mapping[str, jax.Array]


def dream(state: State, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, config: DreamConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.dream.dream`."""
    validation.dream(state, input_ids, attention_mask, config=config)
    is_real_BS = jnp.ones_like(input_ids, dtype=bool) if attention_mask is None else attention_mask
    places_BS = is_real_BS.astype(jnp.int32).cumsum(axis=1) - 1
    decoded = decoder.decode(state, input_ids, places_BS, full_mask(is_real_BS, is_real_BS), config=config)
    logits_BSV = decoder.logits(state, decoded, input_ids.shape[1])
    return shift(logits_BSV).astype(state["lm_head.weight"].dtype)


def shift(logits: jax.Array) -> jax.Array:
    """Move logits [B, S, V] one place on; the first ones stay as well."""
    return jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


def state_shapes(config: DreamConfig) -> states.Shapes:
    """As `gaugeblock.reference.torch.dream.state_shapes`."""
    validation.language_model_config(config, DreamConfig)
    return decoder_states.state_shapes(config)
