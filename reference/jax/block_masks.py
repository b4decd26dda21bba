"""Which tokens see which in masked and block diffusion language models: True where a query may look at a key.

Shapes: B batch_size, S tokens that look, T tokens that are looked at; of training S tokens of a row, noisy and clean ones 2S.
"""

import jax
import jax.numpy as jnp


def full_mask(is_real_query: jax.Array, is_real_key: jax.Array) -> jax.Array:
    """Let every real query [B, S] see every real key [B, T]: [B, S, T] bool."""
    return is_real_query[:, :, None] & is_real_key[:, None, :]


def block_causal_mask(query_places: jax.Array, key_places: jax.Array, *, block_length: int) -> jax.Array:
    """As `gaugeblock.reference.torch.block_masks.block_causal_mask`."""
    query_block_S, key_block_T = (places // block_length for places in (query_places, key_places))
    return query_block_S[..., :, None] >= key_block_T[..., None, :]


def noisy_clean_mask(sample_ids: jax.Array, *, block_length: int) -> jax.Array:
    """As `gaugeblock.reference.torch.block_masks.noisy_clean_mask`."""
    block_BS = places_in_samples(sample_ids) // block_length
    query_block_BS1, key_block_B1S = block_BS[:, :, None], block_BS[:, None, :]
    is_together_BSS = (sample_ids[:, :, None] == sample_ids[:, None, :]) & (sample_ids >= 0)[:, :, None]
    noisy_to_noisy_BSS = is_together_BSS & (query_block_BS1 == key_block_B1S)
    noisy_to_clean_BSS = is_together_BSS & (query_block_BS1 > key_block_B1S)
    clean_to_clean_BSS = is_together_BSS & (query_block_BS1 >= key_block_B1S)
    noisy_BST = jnp.concatenate([noisy_to_noisy_BSS, noisy_to_clean_BSS], axis=2)
    clean_BST = jnp.concatenate([jnp.zeros_like(is_together_BSS), clean_to_clean_BSS], axis=2)
    return jnp.concatenate([noisy_BST, clean_BST], axis=1)


def places_in_samples(sample_ids: jax.Array) -> jax.Array:
    """Count for each token [B, S] how many of its sample come before it: [B, S] int64, 0 for the first."""
    is_together_BSS = sample_ids[:, :, None] == sample_ids[:, None, :]
    return jnp.tril(is_together_BSS, k=-1).sum(axis=2)
