"""Dispatch: routed rows sorted by expert, padded to blocks of one expert each, gathered, and summed up for their tokens.

Routed row n is choice n % K of token n // K. Its *place* is where it stands when rows are sorted by expert.

Shapes: T num_tokens, K top_k, N = T * K routed rows, E num_experts, H hidden_size, B num_blocks, P = B * block_size places.
"""

import jax
import jax.numpy as jnp

from gaugeblock.reference import validation
from gaugeblock.reference.jax.precision import at_least_float32


def sort_by_expert(topk_ids: jax.Array, *, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.dispatch.sort_by_expert`, but all is int32."""
    validation.sort_by_expert(topk_ids, num_experts)
    validation.expert_ids_in_range(topk_ids, num_experts=num_experts)

    expert_N = topk_ids.flatten()
    order_N = expert_N.argsort(stable=True).astype(jnp.int32)
    inverse_TK = order_N.argsort().reshape(topk_ids.shape).astype(jnp.int32)
    group_sizes_E = jnp.bincount(expert_N, length=num_experts).astype(jnp.int32)
    return order_N, inverse_TK, group_sizes_E


def most_blocks(num_rows: int, num_experts: int, block_size: int) -> int:
    """Return how many blocks the worst routing needs: each expert with rows has one that may be short, all others are full."""
    num_short = min(num_rows, num_experts)
    return num_short + (num_rows - num_short) // block_size


def align_to_blocks(topk_ids: jax.Array, *, num_experts: int, block_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.dispatch.align_to_blocks`, but all is int32."""
    validation.align_to_blocks(topk_ids, num_experts, block_size)
    order_N, _, group_sizes_E = sort_by_expert(topk_ids, num_experts=num_experts)
    num_rows = order_N.shape[0]
    num_blocks = most_blocks(num_rows, num_experts, block_size)

    num_blocks_E = (group_sizes_E + block_size - 1) // block_size
    block_ends_E = num_blocks_E.cumsum(0, dtype=jnp.int32)
    expert_B = jnp.searchsorted(block_ends_E, jnp.arange(num_blocks), side="right").astype(jnp.int32)
    expert_ids_B = jnp.where(expert_B < num_experts, expert_B, -1)

    # how far padding moves the rows of each expert
    shift_E = (block_ends_E - num_blocks_E) * block_size - (group_sizes_E.cumsum(0, dtype=jnp.int32) - group_sizes_E)
    expert_N = topk_ids.flatten()[order_N]
    place_N = jnp.arange(num_rows) + shift_E[expert_N]
    padding_P = jnp.full((num_blocks * block_size,), num_rows, dtype=jnp.int32)
    return padding_P.at[place_N].set(order_N), expert_ids_B, block_ends_E[-1] * block_size


def permute(hidden_states: jax.Array, order: jax.Array, *, top_k: int) -> jax.Array:
    """As `gaugeblock.reference.torch.dispatch.permute`."""
    validation.permute(hidden_states, order, top_k)
    validation.routed_rows_in_range(order, num_rows=hidden_states.shape[0] * top_k)

    token_N = order // top_k
    # in float32 for the sake of the gradient, which is a sum over the choices of a token
    return at_least_float32(hidden_states)[token_N].astype(hidden_states.dtype)


def unpermute(rows: jax.Array, inverse: jax.Array, topk_weights: jax.Array) -> jax.Array:
    """As `gaugeblock.reference.torch.dispatch.unpermute`."""
    validation.unpermute(rows, inverse, topk_weights)
    validation.places_in_range(inverse, num_rows=rows.shape[0])

    rows_TKH = at_least_float32(rows)[inverse]
    out_TH = (at_least_float32(topk_weights)[..., None] * rows_TKH).sum(axis=1)
    return out_TH.astype(rows.dtype)
