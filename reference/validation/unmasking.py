"""Calls of steps that decide masked tokens."""

from typing import Any

from gaugeblock.reference.configs import DreamAlgorithm, PlaceStrategy, Remasking
from gaugeblock.reference.validation.arrays import (
    FLOATING,
    INTEGER,
    require_between,
    require_dtype,
    require_interval,
    require_number,
    require_one_of,
    require_same_device,
    require_shape,
)
from gaugeblock.reference.validation.noisy_routers import require_not_negative


def quotas(num_masked: Any, steps: Any) -> None:
    """Check the arguments of `unmasking.quotas`."""
    require_dtype("num_masked", num_masked, INTEGER)
    require_shape("num_masked", num_masked, batch_size=None)
    require_between("steps", steps, 1, 2**31 - 1)


def choose_places(confidence: Any, is_masked: Any, counts: Any, strategy: Any, bound: Any) -> None:
    """Check the arguments of `unmasking.choose_places`."""
    require_dtype("confidence", confidence, FLOATING)
    require_shape("confidence", confidence, batch_size=None, places=None)
    batch_size, places = confidence.shape
    require_dtype("is_masked", is_masked, ("bool",))
    require_shape("is_masked", is_masked, batch_size=batch_size, places=places)
    require_same_device("is_masked", is_masked, "confidence", confidence)
    _require_counts(counts, batch_size, "confidence", confidence)
    require_one_of("strategy", strategy, PlaceStrategy)
    require_number("bound", bound)


def unmasking_step(logits: Any, ids: Any, mask_id: Any, forbidden_ids: Any, *, counts: Any = None, uniforms: Any = None) -> None:
    """Check what the steps of `unmasking` have in common."""
    require_dtype("logits", logits, FLOATING)
    require_shape("logits", logits, batch_size=None, places=None, vocabulary_size=None)
    batch_size, places, vocabulary_size = logits.shape
    require_dtype("ids", ids, INTEGER)
    require_shape("ids", ids, batch_size=batch_size, places=places)
    require_same_device("ids", ids, "logits", logits)
    for name, each in (("mask_id", mask_id), *(("forbidden_ids", each) for each in forbidden_ids)):
        require_between(name, each, 0, vocabulary_size - 1, "vocabulary_size - 1 = ")
    if counts is not None:
        _require_counts(counts, batch_size, "logits", logits)
    if uniforms is not None:
        require_dtype("uniforms", uniforms, ("float32", "float64"))
        require_shape("uniforms", uniforms, batch_size=batch_size, places=places, vocabulary_size=vocabulary_size)
        require_same_device("uniforms", uniforms, "logits", logits)


def random_remasking(ids: Any, place_uniforms: Any, remasking: Any) -> None:
    """Check what `unmasking.llada_step` draws places by."""
    require_one_of("remasking", remasking, Remasking)
    _require_place_uniforms(ids, place_uniforms, needed=remasking == "random")


def dream_places(ids: Any, place_uniforms: Any, rate: Any, algorithm: Any, alg_temp: Any) -> None:
    """Check what `unmasking.dream_step` chooses places by."""
    require_number("rate", rate)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    require_one_of("algorithm", algorithm, DreamAlgorithm)
    require_not_negative("alg_temp", alg_temp)
    _require_place_uniforms(ids, place_uniforms, needed=algorithm == "origin" or alg_temp > 0)


def _require_place_uniforms(ids: Any, place_uniforms: Any, *, needed: bool) -> None:
    if place_uniforms is None:
        if needed:
            raise ValueError("place_uniforms must be given where places are drawn, got None")
        return
    require_dtype("place_uniforms", place_uniforms, ("float32", "float64"))
    require_shape("place_uniforms", place_uniforms, batch_size=ids.shape[0], places=ids.shape[1])
    require_same_device("place_uniforms", place_uniforms, "ids", ids)
    require_interval("place_uniforms", place_uniforms, 0, 1, high_excluded=True)


def _require_counts(counts: Any, batch_size: int, name: str, array: Any) -> None:
    require_dtype("counts", counts, INTEGER)
    require_shape("counts", counts, batch_size=batch_size)
    require_same_device("counts", counts, name, array)
