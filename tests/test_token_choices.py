"""Which tokens logits choose: worked numbers, the public filters written out, the law of what is drawn, and the twins."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from gaugeblock.optimized.compiled import token_choices as optimized_token_choices
from gaugeblock.reference.jax import token_choices as jax_token_choices
from gaugeblock.reference.torch import random, token_choices


def filtered_by_lists(row: list[float], temperature: float, top_k: int, top_p: float, *, top_k_first: bool) -> set[int]:
    """The kept ids, as a person would find them."""
    order = sorted(range(len(row)), key=lambda v: (-row[v], v))
    last = row[order[(top_k or len(row)) - 1]]
    in_top_k = [v for v in order if row[v] >= last]
    weights = {v: math.exp(row[v] / temperature) for v in (in_top_k if top_k_first else order)}
    kept, before = set(), 0.0
    for v in in_top_k:
        if top_p == 1 or before <= top_p:
            kept.add(v)
        before += weights[v] / sum(weights.values())
    return kept


FILTERS = [(1, 0, 0.9), (0.5, 5, 0.7), (2, 3, 1.0), (1.5, 40, 0.25), (1, 7, 0.999)]


@pytest.mark.parametrize("top_k_first", [True, False])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1, 0, 0.9), (0.5, 5, 0.7), (2, 3, 1.0), (1.5, 40, 0.25), (1, 7, 0.999)]
)
def test_filters_are_those_of_lists(temperature: float, top_k: int, top_p: float, top_k_first: bool) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 40))).double()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "top_k_first": top_k_first}
    filtered, kept = token_choices.filter_logits(logits, **options)
    for row, mask in zip(logits.tolist(), kept.tolist(), strict=True):
        assert {v for v, is_kept in enumerate(mask) if is_kept} == filtered_by_lists(row, **options)
    assert torch.equal(filtered, torch.where(kept, logits / temperature, -torch.inf))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.5, 5, 0.7), (2.0, 30, 0.9), (1.5, 40, 0.25)])
def test_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.from_numpy(np.random.default_rng(4).normal(size=(20, 40)))
    best, likely = TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)
    for top_k_first, warpers in ((True, (best, likely)), (False, (likely, best))):
        expected = logits / temperature
        for warper in warpers:
            expected = warper(None, expected)  # type: ignore[arg-type]
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "top_k_first": top_k_first}
        assert torch.equal(token_choices.filter_logits(logits, **options)[0], expected)


def test_the_token_with_which_top_p_is_exceeded_is_kept_and_one_where_it_is_just_reached_too() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    for top_p, count in ((0.25, 1), (0.5, 2), (0.6, 2), (0.75, 3), (0.8, 3), (0.99, 4), (1.0, 4)):
        options = {"temperature": 1, "top_k": 0, "top_p": top_p, "top_k_first": True}
        with jax.enable_x64(True):
            _, in_jax = jax_token_choices.filter_logits(jnp.asarray(logits.numpy()), **options)
        for kept in (token_choices.filter_logits(logits, **options)[1], in_jax):
            assert kept[0].tolist() == [True] * count + [False] * (4 - count), top_p


def test_equal_logits_at_the_end_of_top_k_are_all_kept_and_of_top_p_the_lowest_ids() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    _, kept = token_choices.filter_logits(logits, temperature=1, top_k=2, top_p=1, top_k_first=True)
    assert kept.all()
    equal = torch.zeros(1, 8)
    for framework, array in ((token_choices, equal), (jax_token_choices, jnp.asarray(equal.numpy()))):
        _, kept = framework.filter_logits(array, temperature=1, top_k=0, top_p=0.3, top_k_first=True)
        assert np.asarray(kept)[0].tolist() == [True] * 3 + [False] * 5


def test_which_of_the_two_comes_first_matters() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    counts = [
        int(token_choices.filter_logits(logits, temperature=1, top_k=2, top_p=0.6, top_k_first=first)[1].sum())
        for first in (True, False)
    ]
    assert counts == [1, 2]  # 0.5 of 0.75 exceeds 0.6, 0.5 of 1 does not


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    row, temperature, count = torch.tensor([0.0, 1.0, 2.0, -math.inf, -1.0]), 2.0, 40_000
    uniforms = random.uniform((5,), seed=3, step=0, example=torch.arange(count), purpose=0)
    ids, _ = token_choices.draw_tokens(row.expand(count, 5), uniforms, temperature=temperature, confidence="probability")
    probabilities = torch.softmax(row / temperature, -1)
    deviations = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((torch.bincount(ids, minlength=5) / count - probabilities).abs() <= 5 * deviations).all()


def test_confidences_of_a_worked_row() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    expected = {"probability": 0.5, "margin": 0.25, "negative_entropy": -1.5 * math.log(2)}
    for kind, value in expected.items():
        ids, confidence = token_choices.draw_tokens(logits, None, temperature=0, confidence=kind)  # type: ignore[arg-type]
        assert ids.tolist() == [0] and confidence.item() == pytest.approx(value, abs=1e-15)
        assert torch.equal(token_choices.token_confidence(logits, ids.int(), confidence=kind), confidence)  # type: ignore[arg-type]


def test_confidence_knows_neither_temperature_nor_noise() -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 9))).float()
    uniforms = random.uniform((9,), seed=3, step=0, example=torch.arange(30), purpose=0)
    ids, confidence = token_choices.draw_tokens(logits, uniforms, temperature=3.0, confidence="probability")
    assert (ids != logits.argmax(-1)).any()
    assert torch.equal(confidence, torch.softmax(logits, -1).gather(-1, ids[:, None])[:, 0])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_torch_and_jax_draw_the_same_tokens(temperature: float) -> None:
    logits = np.random.default_rng(2).normal(size=(50, 300)).astype(np.float32)
    uniforms = random.uniform((300,), seed=5, step=1, example=torch.arange(50), purpose=0)
    tokens, confidence = token_choices.draw_tokens(
        torch.from_numpy(logits), uniforms, temperature=temperature, confidence="margin"
    )
    others, also = jax_token_choices.draw_tokens(
        jnp.asarray(logits), jnp.asarray(uniforms.numpy()), temperature=temperature, confidence="margin"
    )
    assert tokens.tolist() == np.asarray(others).tolist()
    np.testing.assert_allclose(confidence.numpy(), np.asarray(also), atol=1e-6)


def test_of_equal_logits_both_take_the_lowest_id() -> None:
    logits = np.zeros((3, 40), dtype=np.float32)
    logits[1, 7:] = 1
    tokens, _ = token_choices.draw_tokens(torch.from_numpy(logits), None, temperature=0, confidence="probability")
    others, _ = jax_token_choices.draw_tokens(jnp.asarray(logits), None, temperature=0, confidence="probability")
    assert tokens.tolist() == np.asarray(others).tolist() == [0, 7, 0]


def test_guidance_goes_away_from_the_unconditional_and_0_is_none() -> None:
    logits, unconditional = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])
    assert token_choices.guided_logits(logits, unconditional, cfg_scale=0).tolist() == [1, 3]
    assert token_choices.guided_logits(logits, unconditional, cfg_scale=2).tolist() == [-1, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be \[num_rows, vocabulary_size\], got \(3,\)"),
        ({"logits": torch.zeros(2, 0), "uniforms": torch.zeros(2, 0)}, "logits must be .* with at least one column"),
        ({"uniforms": None}, "uniforms must be given at temperature 1.0, got None"),
        ({"uniforms": torch.ones(2, 3)}, r"uniforms must be in \[0, 1\), got 1.0..1.0"),
        ({"uniforms": torch.zeros(2, 4)}, r"uniforms must be \[num_rows=2, vocabulary_size=3\], got \(2, 4\)"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"confidence": "entropy"}, "confidence must be 'probability' or 'margin' or 'negative_entropy', got 'entropy'"),
        ({"logits": torch.zeros(2, 1), "uniforms": torch.zeros(2, 1), "confidence": "margin"}, "logits .* two columns"),
    ],
)
def test_bad_calls_are_told(change: dict, message: str) -> None:
    good = {"logits": torch.zeros(2, 3), "uniforms": torch.zeros(2, 3), "temperature": 1.0, "confidence": "probability"}
    call = good | change
    with pytest.raises(ValueError, match=message):
        token_choices.draw_tokens(call.pop("logits"), call.pop("uniforms"), **call)


@pytest.mark.parametrize("kind", ["random", "ties", "forbidden", "nan"])
def test_counting_keeps_what_sorting_keeps(kind: str) -> None:
    draw = np.random.default_rng(3)
    for number in range(150):
        size = int(draw.integers(1, 40))
        logits = torch.from_numpy(draw.normal(size=(3, size)) * 3)
        if kind == "ties":
            logits = (logits * 2).round() / 4
        if kind in ("forbidden", "nan"):
            logits[torch.from_numpy(draw.uniform(size=(3, size)) < 0.3)] = -math.inf
            logits[:, 0] = 0.0
        if kind == "nan":
            logits[1, -1] = math.nan
        options = {
            "temperature": (0.5, 1.0, 2.0)[number % 3],
            "top_k": int(draw.integers(0, size + 1)),
            "top_p": float(draw.choice([0.125, 0.5, 0.9, 1.0])),
            "top_k_first": bool(draw.integers(2)),
        }
        filtered, kept = optimized_token_choices.filter_logits(logits, **options)
        known, known_kept = token_choices.filter_logits(logits, **options)
        is_near = (token_choices.probability_before(logits, **options) - options["top_p"]).abs() < 1e-12
        assert torch.equal(kept | is_near, known_kept | is_near), options
        assert torch.equal(filtered.masked_fill(is_near, 0), known.masked_fill(is_near, 0)), options
