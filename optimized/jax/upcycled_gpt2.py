"""The upcycled GPT-2 in JAX: the reference, compiled for each configuration and each number of sequences and tokens."""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import UpcycledGPT2Config
from gaugeblock.reference.jax import upcycled_gpt2 as reference


def upcycled_gpt2(
    state: Mapping[str, jax.Array],
    input_ids: jax.Array,
    noise: jax.Array,
    *,
    training: bool,
    config: UpcycledGPT2Config,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return `gaugeblock.reference.jax.upcycled_gpt2.upcycled_gpt2`, compiled; ids, unreadable if traced, are checked before."""
    validation.upcycled_gpt2(state, input_ids, noise, config, reference.state_shapes(config))
    validation.gpt2_input_ids_in_range(input_ids, config)
    return _upcycled_gpt2(dict(state), input_ids, noise, training=training, config=config)


_upcycled_gpt2 = jax.jit(reference.upcycled_gpt2, static_argnames=("training", "config"))
