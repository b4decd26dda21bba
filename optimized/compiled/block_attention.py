"""Attention of language models by torch's flex_attention, which passes over blocks of a mask that hide all of their pairs.

On a GPU, since on a CPU it has no backward. A mask is given as a rule for one query and one key, from which a table of its
blocks, of 128 queries and 128 keys each, is made once for a call: no array of all pairs stays in memory. What a hidden block's
values are does not matter, where torch's attention multiplies them by 0. A query that sees nothing has 0.

Shapes: B batch_size, S tokens that look, T tokens that are looked at, of training 2S each, A heads of queries, K heads of keys
and values, F features of a head.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from gaugeblock.optimized import decoder_attention
from gaugeblock.reference.torch.block_masks import places_in_samples

LEAST_FEATURES = 16  # of a head, what a GPU's matrix units multiply at once


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled when it is first needed, for one size, and for all when there is a second."""
    return torch.compile(function)


def full_mask(is_real_query: torch.Tensor, is_real_key: torch.Tensor) -> Any:
    """As `gaugeblock.reference.torch.block_masks.full_mask`, as a table of blocks."""

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return is_real_query[batch, query] & is_real_key[batch, key]

    return _blocks(sees, len(is_real_query), is_real_query.shape[1], is_real_key.shape[1], is_real_key.device)


def block_causal_mask(query_places: torch.Tensor, key_places: torch.Tensor, *, block_length: int) -> Any:
    """As `gaugeblock.reference.torch.block_masks.block_causal_mask` of places [1, S] and [1, T], as a table of blocks."""
    query_block_S, key_block_T = query_places[0] // block_length, key_places[0] // block_length

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return query_block_S[query] >= key_block_T[key]

    return _blocks(sees, 1, len(query_block_S), len(key_block_T), key_places.device)


def noisy_clean_mask(sample_ids: torch.Tensor, *, block_length: int) -> Any:
    """As `gaugeblock.reference.torch.block_masks.noisy_clean_mask`, as a table of blocks."""
    batch_size, num_tokens = sample_ids.shape
    sample_BT, block_BT = (each.repeat(1, 2) for each in (sample_ids, places_in_samples(sample_ids) // block_length))
    is_clean_T = torch.arange(2 * num_tokens, device=sample_ids.device) >= num_tokens

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        sample, query_block, key_block = sample_BT[batch, query], block_BT[batch, query], block_BT[batch, key]
        # a clean key is seen from later blocks, and from its own by clean queries; a noisy one by noisy queries of its own block
        is_own = (query_block == key_block) & (is_clean_T[query] == is_clean_T[key])
        is_before = (query_block > key_block) & is_clean_T[key]
        return (sample == sample_BT[batch, key]) & (sample >= 0) & (is_own | is_before)

    return _blocks(sees, batch_size, 2 * num_tokens, 2 * num_tokens, sample_ids.device)


def _blocks(sees: Any, batch_size: int, num_queries: int, num_keys: int, device: torch.device) -> BlockMask | None:
    """Return the table of a rule's blocks, the same for all heads; none where there is no example."""
    if not batch_size:
        return None
    # compiled, it makes no array of all pairs
    create = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    # one example's table serves a batch of any size
    return create(sees, batch_size, None, num_queries, num_keys, device=device)


def attention(
    query_BASF: torch.Tensor, key_BKTF: torch.Tensor, value_BKTF: torch.Tensor, mask: Any, *, scale: float
) -> torch.Tensor:
    """Return attention [B, A, S, F] under a mask of any kind; by flex_attention under a table of blocks."""
    if not isinstance(mask, BlockMask) or not len(query_BASF):
        mask = None if isinstance(mask, BlockMask) else mask
        return decoder_attention.attention(query_BASF, key_BKTF, value_BKTF, mask, scale=scale)
    return _by_blocks(query_BASF, key_BKTF, value_BKTF, mask, scale)


@torch.compiler.disable
def _by_blocks(
    query_BASF: torch.Tensor, key_BKTF: torch.Tensor, value_BKTF: torch.Tensor, mask: BlockMask, scale: float
) -> torch.Tensor:
    """Return attention under a table of blocks, compiled by itself: where all sizes are symbols, so is the scale, which no kernel
    takes."""
    features = query_BASF.shape[-1]
    heads: tuple[torch.Tensor, ...] = query_BASF, key_BKTF, value_BKTF
    if features < LEAST_FEATURES:
        heads = tuple(functional.pad(each, (0, LEAST_FEATURES - features)) for each in heads)
    attended = _compiled(flex_attention)(*heads, block_mask=mask, scale=scale, enable_gqa=True)
    return attended[..., :features]


BLOCKS = decoder_attention.Masks(full_mask=full_mask, block_causal_mask=block_causal_mask, noisy_clean_mask=noisy_clean_mask)


def masks_of_blocks(table: torch.Tensor) -> decoder_attention.Masks:
    """Return what makes masks for a model with that table of embeddings: of blocks, where flex_attention takes its dtype."""
    is_taken = table.device.type == "cuda" and table.dtype != torch.float64
    return BLOCKS if is_taken else decoder_attention.WHOLE
