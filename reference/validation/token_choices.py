"""Calls of what chooses tokens."""

from typing import Any

from gaugeblock.reference.configs import TokenConfidence
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    require_between,
    require_dtype,
    require_interval,
    require_one_of,
    require_positive,
    require_same_device,
    require_shape,
)
from gaugeblock.reference.validation.noisy_routers import require_not_negative


def filter_logits(logits: Any, temperature: Any, top_k: Any, top_p: Any, top_k_first: Any) -> None:
    """Check the arguments of `token_choices.filter_logits`."""
    _require_logits(logits)
    require_positive("temperature", temperature)
    require_between("top_k", top_k, 0, logits.shape[1], "vocabulary_size=")
    require_positive("top_p", top_p)
    if top_p > 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if not isinstance(top_k_first, bool):
        raise TypeError(f"top_k_first must be a bool, got {top_k_first!r}")


def draw_tokens(logits: Any, uniforms: Any, temperature: Any, confidence: Any) -> None:
    """Check the arguments of `token_choices.draw_tokens`."""
    _require_logits(logits)
    require_not_negative("temperature", temperature)
    require_one_of("confidence", confidence, TokenConfidence)
    if confidence == "margin" and logits.shape[1] < 2:
        raise ValueError(f"logits must have at least two columns for a margin, got {tuple(logits.shape)}")
    if uniforms is None:
        if temperature > 0:
            raise ValueError(f"uniforms must be given at temperature {temperature}, got None")
        return
    require_dtype("uniforms", uniforms, ("float32", "float64"))
    require_shape("uniforms", uniforms, num_rows=logits.shape[0], vocabulary_size=logits.shape[1])
    require_same_device("uniforms", uniforms, "logits", logits)
    require_interval("uniforms", uniforms, 0, 1, high_excluded=True)


def _require_logits(logits: Any) -> None:
    require_dtype("logits", logits, FLOATING)
    require_shape("logits", logits, num_rows=None, vocabulary_size=None)
    if logits.shape[1] < 1:
        raise ValueError(f"logits must be [num_rows, vocabulary_size] with at least one column, got {tuple(logits.shape)}")
