"""CLIP's text encoder in JAX: the reference, compiled for each configuration and each number of captions and tokens."""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import CLIPTextConfig
from gaugeblock.reference.jax import clip_text as reference


def clip_text(
    state: Mapping[str, jax.Array],
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    config: CLIPTextConfig,
) -> tuple[jax.Array, jax.Array]:
    """Return `gaugeblock.reference.jax.clip_text.clip_text`, compiled; ids, unreadable while traced, are checked before."""
    validation.clip_text(state, input_ids, attention_mask, config, reference.state_shapes(config))
    validation.clip_input_ids_in_range(input_ids, config)
    return _clip_text(dict(state), input_ids, attention_mask, config=config)


_clip_text = jax.jit(reference.clip_text, static_argnames="config")
