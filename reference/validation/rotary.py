"""Calls of rotary position embeddings."""

from typing import Any

from gaugeblock.reference.configs import RotaryPairs
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    require_between,
    require_dtype,
    require_like,
    require_one_of,
    require_positive,
    require_same_device,
    require_shape,
)

MOST_FEATURES = 2**16


def rotary_table(places: Any, features: Any, theta: Any, dtype: str) -> None:
    """Check the arguments of `rotary.rotary_table`; dtype by its name."""
    require_dtype("places", places, (*FLOATING, *INTEGER))
    if not isinstance(features, tuple) or not features:
        raise TypeError(f"features must be a tuple of numbers of features, got {features!r}")
    for size in features:
        require_between("features", size, 2, MOST_FEATURES)
        if size % 2:
            raise ValueError(f"features must be even, got {features}")
    require_shape("places", places, num_tokens=None, axes=len(features))
    require_positive("theta", theta)
    if dtype.removeprefix("torch.") not in FLOATING:
        raise TypeError(f"dtype must be {' or '.join(FLOATING)}, got {dtype}")


def rotate(heads: Any, cos: Any, sin: Any, pairs: Any) -> None:
    """Check the arguments of `rotary.rotate`."""
    _heads("heads", heads)
    _angles(cos, sin, "heads", heads)
    require_one_of("pairs", pairs, RotaryPairs)


def qk_norm_rotary(query: Any, key: Any, query_weight: Any, key_weight: Any, cos: Any, sin: Any, eps: Any, pairs: Any) -> None:
    """Check the arguments of `rotary.qk_norm_rotary`."""
    _heads("query", query)
    batch_size, _, num_tokens, head_size = query.shape
    sizes = {"num_tokens": num_tokens, "head_size": head_size}
    require_like("key", key, "query", query, batch_size=batch_size, num_key_heads=None, **sizes)
    for name, weight in (("query_weight", query_weight), ("key_weight", key_weight)):
        require_like(name, weight, "query", query, head_size=head_size)
    _angles(cos, sin, "query", query)
    require_positive("eps", eps)
    require_one_of("pairs", pairs, RotaryPairs)


def _heads(name: str, heads: Any) -> None:
    require_dtype(name, heads, FLOATING)
    require_shape(name, heads, batch_size=None, num_heads=None, num_tokens=None, head_size=None)
    if heads.shape[3] % 2:
        raise ValueError(f"{name} must have heads of an even size, got {tuple(heads.shape)}")


def _angles(cos: Any, sin: Any, heads_name: str, heads: Any) -> None:
    sizes = {"num_tokens": heads.shape[2], "half_of_head_size": heads.shape[3] // 2}
    require_dtype("cos", cos, ("float32", "float64"))
    require_shape("cos", cos, **sizes)
    require_same_device("cos", cos, heads_name, heads)
    require_like("sin", sin, "cos", cos, **sizes)
