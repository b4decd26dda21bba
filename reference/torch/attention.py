"""Attention of queries to keys, with several heads.

Shapes: B batch_size, S tokens that ask, T tokens that are asked, A num_heads, F features of a head, D = A * F.
"""

import math

import torch


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return for each query the mean of the values, weighted by how well their keys fit.

        out = softmax(query key^T / sqrt(features of a head), over the keys that the mask lets through) value

    Args:
        query: [batch_size, num_heads, num_tokens, features], floating.
        key: [batch_size, num_heads, num_keys, features].
        value: [batch_size, num_heads, num_keys, features of a value].
        mask: [batch_size or 1, num_heads or 1, num_tokens or 1, num_keys], bool, True where a query may look; all by default.

    Returns:
        [batch_size, num_heads, num_tokens, features of a value], dtype of value; 0 for a query that may look nowhere.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; zeros as torch's scaled_dot_product_attention gives them.
    """
    scores_BAST = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is None:
        return scores_BAST.softmax(dim=-1) @ value
    # of a row without any key softmax and its gradient are NaN, so it sees all keys and is left out afterwards
    is_lost = ~mask.any(dim=-1, keepdim=True)
    probabilities_BAST = torch.where(mask | is_lost, scores_BAST, -math.inf).softmax(dim=-1)
    return torch.where(is_lost, 0.0, probabilities_BAST) @ value


def split_heads(tokens: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Cut the last axis of [batch_size, num_tokens, hidden_size] into heads: [batch_size, num_heads, num_tokens, features]."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(heads: torch.Tensor) -> torch.Tensor:
    """Put heads together again: [batch_size, num_tokens, num_heads * features]."""
    return heads.transpose(1, 2).flatten(2)
