"""The rotary embeddings of `reference.torch.rotary`, compiled by torch.compile: norm and rotation fused.

Bound by memory, like the Triton version. One compilation serves all sizes but 0 and 1, which torch.compile treats by
themselves, as it does each dtype, kind of pairs, order of strides and set of wanted gradients.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import RotaryPairs
from gaugeblock.reference.torch import rotary as reference

# The references check their arguments while they are traced; an error that is raised there would lose its type.
_rotate = torch.compile(reference.rotate, dynamic=True)
_qk_norm_rotary = torch.compile(reference.qk_norm_rotary, dynamic=True)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: RotaryPairs) -> torch.Tensor:
    """Turn each pair of features of each head by the angle of its token: `reference.torch.rotary.rotate`.

    Args:
        heads: [batch_size, num_heads, num_tokens, head_size], floating; head_size is even.
        cos: [num_tokens, head_size / 2], float32 or float64.
        sin: [num_tokens, head_size / 2], as cos.
        pairs: "interleaved" or "half-split".

    Returns:
        [batch_size, num_heads, num_tokens, head_size], dtype as heads; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, head_size is odd, or pairs is another name.

    Source: `gaugeblock.reference.torch.rotary.rotate`.
    """
    validation.rotate(heads, cos, sin, pairs)
    return _rotate(heads, cos, sin, pairs=pairs)


def qk_norm_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float,
    pairs: RotaryPairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize each head of queries and keys, then turn it: `reference.torch.rotary.qk_norm_rotary`.

    Args:
        query: [batch_size, num_heads, num_tokens, head_size], floating; key and the weights have its dtype.
        key: [batch_size, num_key_heads, num_tokens, head_size].
        query_weight: [head_size].
        key_weight: [head_size].
        cos: [num_tokens, head_size / 2], float32 or float64.
        sin: [num_tokens, head_size / 2], as cos.
        eps: Added to the mean square; positive.
        pairs: As of `rotate`.

    Returns:
        query, key: shapes and dtypes as given; each is computed in float32 (float64 for float64 inputs) and rounded once.

    Raises: as `rotate`, and where eps is not positive.

    Source: `gaugeblock.reference.torch.rotary.qk_norm_rotary`.
    """
    validation.qk_norm_rotary(query, key, query_weight, key_weight, cos, sin, eps, pairs)
    return _qk_norm_rotary(query, key, query_weight, key_weight, cos, sin, eps=eps, pairs=pairs)
