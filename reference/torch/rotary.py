"""Rotary position embedding: queries and keys turn by angles that their places say.

Shapes: B batch_size, A num_heads, S tokens of a sequence, F features of a head, R = F / 2 pairs of features.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.configs import RotaryPairs
from gaugeblock.reference.torch.norms import rms_norm
from gaugeblock.reference.torch.precision import at_least_float32


def rotary_table(
    places: torch.Tensor, *, features: tuple[int, ...], theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the angles by which the pairs of features of each token turn.

        angle[s, i] = places[s, axis] * theta ** (-2 i / features[axis]),  i = 0 .. features[axis] / 2 - 1

    The pairs of the first axis come first.

    Args:
        places: [num_tokens, axes], floating or integer: where a token is, along each axis (of text, 0).
        features: How many features of a head each axis turns; even.
        theta: Of the longest wave; positive.
        dtype: Of the result, floating; angles are computed in float64 and rounded once.

    Returns:
        cos, sin: [num_tokens, sum of features / 2].

    Raises:
        TypeError: places is not an array of the dtype above, an option is no number, or dtype is not floating.
        ValueError: Sizes do not fit together, features are not even, or theta is not positive.

    Source: Su et al. 2021 (arXiv:2104.09864), section 3.2; several axes as in black-forest-labs/flux math.py.
    """
    validation.rotary_table(places, features, theta, str(dtype))
    angles = []
    for axis, size in enumerate(features):
        index_R = torch.arange(0, size, 2, dtype=torch.float64, device=places.device)
        angles.append(places[:, axis, None].to(torch.float64) * theta ** (-index_R / size))
    angle_SR = torch.cat(angles, dim=-1)
    return torch.cos(angle_SR).to(dtype), torch.sin(angle_SR).to(dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, pairs: RotaryPairs) -> torch.Tensor:
    """Turn each pair of features of each head by the angle of its token.

        (x, y) becomes (x cos - y sin, y cos + x sin)

    Args:
        heads: [batch_size, num_heads, num_tokens, head_size], floating; head_size is even.
        cos: [num_tokens, head_size / 2], float32 or float64, whatever heads are.
        sin: [num_tokens, head_size / 2], as cos.
        pairs: "interleaved": features 2 i and 2 i + 1 are pair i (Flux); "half-split": features i and i + head_size / 2
            are (Llama, Qwen).

    Returns:
        [batch_size, num_heads, num_tokens, head_size], dtype as heads; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: Ranks, sizes or devices do not fit together, head_size is odd, or pairs is another name.

    Source: Su et al. 2021 (arXiv:2104.09864), equation 34, for "interleaved"; EleutherAI/gpt-neox for "half-split".
    """
    validation.rotate(heads, cos, sin, pairs)
    heads_BASF, cos_SR, sin_SR = at_least_float32(heads), at_least_float32(cos), at_least_float32(sin)
    if pairs == "interleaved":
        x_BASR, y_BASR = heads_BASF[..., 0::2], heads_BASF[..., 1::2]
    else:
        x_BASR, y_BASR = heads_BASF.chunk(2, dim=-1)
    turned = x_BASR * cos_SR - y_BASR * sin_SR, y_BASR * cos_SR + x_BASR * sin_SR
    out_BASF = torch.stack(turned, dim=-1).flatten(-2) if pairs == "interleaved" else torch.cat(turned, dim=-1)
    return out_BASF.to(heads.dtype)


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
    """Normalize each head of queries and keys (`rms_norm`), then turn it (`rotate`).

        (x, y) becomes (x' cos - y' sin, y' cos + x' sin),  x' = x / sqrt(mean over the head of x**2 + eps) * weight

    Args:
        query: [batch_size, num_heads, num_tokens, head_size], floating; key and the weights have its dtype.
        key: [batch_size, num_key_heads, num_tokens, head_size]; fewer heads than queries have, where these share keys.
        query_weight: [head_size], of all heads of the queries.
        key_weight: [head_size], of all heads of the keys.
        cos: [num_tokens, head_size / 2], float32 or float64, whatever queries are.
        sin: [num_tokens, head_size / 2], as cos.
        eps: Added to the mean square; positive.
        pairs: As of `rotate`.

    Returns:
        query, key: shapes and dtypes as given; each is computed in float32 (float64 for float64 inputs) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or eps is no number.
        ValueError: Ranks, sizes or devices do not fit together, head_size is odd, eps is not positive, or pairs is another
            name.

    Source: Henry et al. 2020 (arXiv:2010.04245), the norm before the product; black-forest-labs/flux math.py and layers.py,
    QKNorm and apply_rope; Qwen3 (arXiv:2505.09388), section 2.
    """
    validation.qk_norm_rotary(query, key, query_weight, key_weight, cos, sin, eps, pairs)
    query_BASF = rms_norm(at_least_float32(query), at_least_float32(query_weight), eps=eps)
    key_BASF = rms_norm(at_least_float32(key), at_least_float32(key_weight), eps=eps)
    turned_BASF, turned_key_BASF = (rotate(each, cos, sin, pairs=pairs) for each in (query_BASF, key_BASF))
    return turned_BASF.to(query.dtype), turned_key_BASF.to(key.dtype)
