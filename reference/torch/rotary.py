"""Rotary position embedding: queries and keys turn by angles that their places say.

Shapes: B batch_size, A num_heads, S tokens of a sequence, F features of a head, R = F / 2 pairs of features.
"""

import torch

from gaugeblock.reference.configs import RotaryPairs
from gaugeblock.reference.torch.norms import rms_norm


def rotary_table(
    places: torch.Tensor, *, features: tuple[int, ...], theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the angles by which the pairs of features of each token turn.

        angle[s, i] = places[s, axis] * theta ** (-2 i / features[axis]),  i = 0 .. features[axis] / 2 - 1

    The pairs of the first axis come first.

    Args:
        places: [num_tokens, axes], floating or integer: where a token is, along each axis (of text, 0).
        features: How many features of a head each axis turns; even.
        theta: Of the longest wave.
        dtype: Of the result; angles are computed in float64 and rounded once.

    Returns:
        cos, sin: [num_tokens, sum of features / 2].

    Source: Su et al. 2021 (arXiv:2104.09864), section 3.2; several axes as in black-forest-labs/flux math.py.
    """
    angles = []
    for axis, size in enumerate(features):
        index_R = torch.arange(0, size, 2, dtype=torch.float64, device=places.device)
        angles.append(places[:, axis, None].to(torch.float64) * theta ** (-index_R / size))
    angle_SR = torch.cat(angles, dim=-1)
    return torch.cos(angle_SR).to(dtype), torch.sin(angle_SR).to(dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: RotaryPairs) -> torch.Tensor:
    """Turn each pair of features of [B, A, S, F] by the angle of its token, cos and sin [S, F / 2].

        (x, y) becomes (x cos - y sin, y cos + x sin)

    "interleaved": features 2 i and 2 i + 1 are a pair (Flux); "half-split": features i and i + F / 2 are (Llama, Qwen).
    """
    if pairs == "interleaved":
        x_BASR, y_BASR = heads[..., 0::2], heads[..., 1::2]
    else:
        x_BASR, y_BASR = heads.chunk(2, dim=-1)
    turned = x_BASR * cos - y_BASR * sin, y_BASR * cos + x_BASR * sin
    return torch.stack(turned, dim=-1).flatten(-2) if pairs == "interleaved" else torch.cat(turned, dim=-1)


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
    """Normalize each head of queries and keys [B, A, S, F] (`rms_norm`), then turn it (`rotate`)."""
    query_BASF = rotate(rms_norm(query, query_weight, eps=eps), cos, sin, pairs=pairs)
    key_BASF = rotate(rms_norm(key, key_weight, eps=eps), cos, sin, pairs=pairs)
    return query_BASF, key_BASF
