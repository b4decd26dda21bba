"""LLaDA in JAX: the reference, compiled for each configuration and each number of sequences and tokens.

Ids, unreadable while traced, are checked before. Attention is XLA's for the reasons that `optimized.jax.sdar` gives.
"""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import LLaDAConfig
from gaugeblock.reference.jax import llada as reference

State = Mapping[str, jax.Array]


def llada(state: State, input_ids: jax.Array, attention_mask: jax.Array | None = None, *, config: LLaDAConfig) -> jax.Array:
    """Return `gaugeblock.reference.jax.llada.llada`, compiled."""
    validation.llada(state, input_ids, attention_mask, config=config)
    return _llada(dict(state), input_ids, attention_mask, config=config)


_llada = jax.jit(reference.llada, static_argnames="config")
