"""SDAR in JAX: the reference, compiled for each configuration and each number of sequences and tokens.

Ids, unreadable while traced, are checked before.

Attention is the reference's, which XLA fuses as far as it can, and not `jax.nn.dot_product_attention`. Its implementation "xla"
makes all scores as well, and takes as long on a CPU (1024 tokens, 8 heads of 128 features, blocks of 4: 0.09 s forward, 0.20 s
with backward, both); its softmax is of float32 in float64 too, and a query that sees nothing gets the mean of all values, not 0.
"cudnn", by its source, takes no float32, in which the reference computes; a mask becomes an array of numbers that are added to
all scores, so that no block is passed over, and queries that see nothing get the mean as well.
"""

from collections.abc import Mapping

import jax

from gaugeblock.reference import validation
from gaugeblock.reference.configs import SDARConfig, SDARMoEConfig
from gaugeblock.reference.jax import sdar as reference

State = Mapping[str, jax.Array]


def sdar(state: State, input_ids: jax.Array, *, config: SDARConfig) -> jax.Array:
    """Return `gaugeblock.reference.jax.sdar.sdar`, compiled."""
    validation.sdar(state, input_ids, config=config)
    return _sdar(dict(state), input_ids, config=config)


def sdar_moe(state: State, input_ids: jax.Array, *, config: SDARMoEConfig) -> tuple[jax.Array, jax.Array]:
    """Return `gaugeblock.reference.jax.sdar.sdar_moe`, compiled."""
    validation.sdar_moe(state, input_ids, config=config)
    return _sdar_moe(dict(state), input_ids, config=config)


def sdar_cached(
    state: State, input_ids: jax.Array, past_keys: jax.Array, past_values: jax.Array, *, config: SDARConfig | SDARMoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `gaugeblock.reference.jax.sdar.sdar_cached`, compiled, for each number of past tokens too."""
    validation.sdar_cached(state, input_ids, past_keys, past_values, config=config)
    return _sdar_cached(dict(state), input_ids, past_keys, past_values, config=config)


def sdar_training(
    state: State, noisy_ids: jax.Array, clean_ids: jax.Array, sample_ids: jax.Array, *, config: SDARConfig | SDARMoEConfig
) -> jax.Array:
    """Return `gaugeblock.reference.jax.sdar.sdar_training`, compiled."""
    validation.sdar_training(state, noisy_ids, clean_ids, sample_ids, config=config)
    return _sdar_training(dict(state), noisy_ids, clean_ids, sample_ids, config=config)


_sdar, _sdar_moe, _sdar_cached, _sdar_training = (
    jax.jit(each, static_argnames="config")
    for each in (reference.sdar, reference.sdar_moe, reference.sdar_cached, reference.sdar_training)
)
