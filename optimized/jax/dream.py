"""Dream in JAX: the reference, compiled for each configuration and each number of sequences and tokens.

Ids, unreadable while traced, are checked before. Attention is XLA's for the reasons that `optimized.jax.sdar` gives.
"""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DreamConfig
from gaugeblock.reference.jax import dream as reference

State = Mapping[str, jax.Array]


def dream(state: State, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, config: DreamConfig) -> jax.Array:
    """Return `gaugeblock.reference.jax.dream.dream`, compiled."""
    validation.dream(state, input_ids, attention_mask, config=config)
    return _dream(dict(state), input_ids, attention_mask, config=config)


_dream = jax.jit(reference.dream, static_argnames="config")
