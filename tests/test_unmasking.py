"""Which masks a step decides: quotas and strategies by hand, the bugs of public loops that are not here, and the twins."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are decorated

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.optimized.triton import unmasking as triton_unmasking
from gaugeblock.reference.configs import DreamDecodingConfig
from gaugeblock.reference.jax import unmasking as jax_unmasking
from gaugeblock.reference.torch import random, unmasking
from tests.test_host_reads import no_host_reads

MASK, VOCABULARY = 6, 7


def chosen(confidence: list, is_masked: list, count: int, strategy: str, bound: float = 0.0) -> list[int]:
    """The places that both frameworks choose in one row."""
    arrays = np.array([confidence], np.float32), np.array([is_masked], bool), np.array([count])
    one = unmasking.choose_places(*map(torch.from_numpy, arrays), strategy=strategy, bound=bound)  # type: ignore[arg-type]
    other = jax_unmasking.choose_places(*map(jnp.asarray, arrays), strategy=strategy, bound=bound)  # type: ignore[arg-type]
    assert one.tolist() == np.asarray(other).tolist()
    return [place for place, accepted in enumerate(one[0].tolist()) if accepted]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 7)])
def test_a_kernel_takes_none_and_more_places_than_comparisons_at_a_time(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_unmasking, "TILE", 4)
    confidence = -torch.rand(shape, generator=torch.Generator().manual_seed(0))
    arrays = confidence, confidence < -0.25, torch.full(shape[:1], 3)
    for strategy, bound in (("static", 0.0), ("entropy_bounded", 1.5)):
        places = triton_unmasking.choose_places(*arrays, strategy=strategy, bound=bound)  # type: ignore[arg-type]
        assert torch.equal(places, unmasking.choose_places(*arrays, strategy=strategy, bound=bound))  # type: ignore[arg-type]


def test_quotas_are_equal_but_for_one_more_at_first() -> None:
    for masks, steps in ((8, 8), (7, 4), (3, 5), (0, 2), (128, 3)):
        quotas = unmasking.quotas(torch.tensor([masks, masks + 1]), steps=steps)[0].tolist()
        assert quotas == [masks // steps + (step < masks % steps) for step in range(steps)] and sum(quotas) == masks
        assert quotas == np.asarray(jax_unmasking.quotas(jnp.asarray([masks]), steps=steps))[0].tolist()


@pytest.mark.parametrize(
    ("strategy", "count", "bound", "places"),
    [
        ("static", 2, 0, [0, 3]),
        ("static", 0, 0, []),
        ("static", 9, 0, [0, 2, 3, 4]),  # place 1 is no mask
        ("dynamic", 1, 0.5, [0, 3, 4]),  # all above it, not the best alone
        ("dynamic", 4, 0.5, [0, 2, 3, 4]),  # too few above it
        ("dynamic", 1, 0.95, [0]),  # none
        ("dynamic", 1, 0.875, [0]),  # 0.875 is not above 0.875
        ("sequential", 2, 0, [0, 2]),
    ],
)
def test_strategies(strategy: str, count: int, bound: float, places: list[int]) -> None:
    assert chosen([0.9, 1.0, 0.25, 0.875, 0.75], [True, False, True, True, True], count, strategy, bound) == places


@pytest.mark.parametrize(
    ("bound", "places"), [(0.0, [2]), (0.25, [2]), (0.26, [2]), (0.75, [2]), (0.8, [0, 2]), (9.0, [0, 2, 3])]
)
def test_entropies_are_added_up_ascending_and_one_is_always_taken(bound: float, places: list[int]) -> None:
    assert chosen([-0.5, -0.125, -0.25, -1.0], [True, False, True, True], 0, "entropy_bounded", bound) == places


def test_of_equal_confidences_the_first_places_are_taken() -> None:
    assert chosen([0.5] * 40, [place != 1 for place in range(40)], 3, "static") == [0, 2, 3]


def test_a_mask_without_confidence_still_comes_before_what_is_no_mask() -> None:
    nothing = [-np.inf, 0.9, np.nan, -np.inf]
    assert chosen(nothing, [True, False, True, True], 3, "static") == [0, 2, 3]
    assert chosen(nothing, [True, False, True, True], 1, "static") == [0]


def test_places_are_drawn_without_replacement_by_their_share() -> None:
    confidence, count = torch.tensor([0.9, 0.5, 0.1, 0.8]), 20_000
    uniforms = random.uniform((4,), seed=1, step=0, example=torch.arange(count), purpose=0)
    noisy = unmasking.noisy_confidence(confidence.expand(count, 4), uniforms, alg_temp=0.5)
    accepted = unmasking.choose_places(
        noisy, torch.ones(count, 4, dtype=torch.bool), torch.full((count,), 1), strategy="static", bound=0
    )
    share = torch.softmax(confidence / 0.5, -1)
    assert ((accepted.double().mean(0) - share).abs() < 5 * (share / count).sqrt()).all()


def example(seed: int = 0, *, masks: tuple[int, ...] = (1, 2, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that like the mask best, and a block of which these places are masks."""
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 5, VOCABULARY))).float()
    logits[..., MASK] = 9.0
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    ids[0, list(masks)] = MASK
    return logits, ids


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("strategy", ["static", "dynamic", "sequential", "entropy_bounded"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_mask_stays_and_no_mask_is_chosen(count: int, strategy: str, temperature: float) -> None:
    logits, ids = example()
    uniforms = random.uniform((5, VOCABULARY), seed=0, step=0, example=torch.arange(1), purpose=0)
    options = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "strategy": strategy, "bound": 0.85}
    new, accepted = unmasking.sdar_step(logits, ids, torch.tensor([count]), uniforms, mask_id=MASK, **options)  # type: ignore[arg-type]
    assert torch.equal(new == MASK, (ids == MASK) & ~accepted)
    assert torch.equal(new[ids != MASK], ids[ids != MASK]) and not accepted[ids != MASK].any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_other_steps_too_leave_what_is_no_mask(temperature: float) -> None:
    logits, ids = example()
    uniforms, places = torch.full(logits.shape, 0.5), torch.tensor([[0.9, 0.1, 0.5, 0.8, 0.3]])
    options = {"mask_id": MASK, "temperature": temperature}
    for made in (
        unmasking.llada_step(logits, ids.int(), torch.tensor([2]), uniforms, None, **options),  # type: ignore[arg-type]
        unmasking.dream_step(  # type: ignore[arg-type]
            logits, ids.int(), uniforms, places, rate=0.7, top_k=0, top_p=1.0, algorithm="entropy", alg_temp=0.0, **options
        ),
    ):
        new, accepted = made
        assert new.dtype == torch.int32 and accepted.sum() == 2
        assert torch.equal(new == MASK, (ids == MASK) & ~accepted) and torch.equal(new[ids != MASK], ids.int()[ids != MASK])


@pytest.mark.parametrize("strategy", ["static", "dynamic", "sequential", "entropy_bounded"])
def test_no_step_waits_for_the_device(strategy: str) -> None:
    logits, ids = example()
    uniforms, places, count = torch.full(logits.shape, 0.5), torch.full((1, 5), 0.5), torch.tensor([2])
    options = {"mask_id": MASK, "temperature": 1.0, "forbidden_ids": (0,)}
    filters = {"top_k": 3, "top_p": 0.9}
    with no_host_reads():
        unmasking.llada_step(logits, ids, count, uniforms, places, remasking="random", late_ids=(5,), **options)  # type: ignore[arg-type]
        unmasking.sdar_step(logits, ids, count, uniforms, strategy=strategy, bound=0.5, **options, **filters)  # type: ignore[arg-type]
        for algorithm in ("origin", "entropy"):
            unmasking.dream_step(  # type: ignore[arg-type]
                logits, ids, uniforms, places, rate=0.5, algorithm=algorithm, alg_temp=0.5, **options, **filters
            )
        unmasking.quotas(count, steps=3)


def test_top_k_of_one_makes_every_draw_certain_but_greedy_is_not() -> None:
    """A confidence after the filters is 1 for all, and so dynamic accepts the whole block; that of greedy is among all tokens."""
    logits, ids = example()
    uniforms = torch.full(logits.shape, 0.5)
    options = {"top_p": 1.0, "strategy": "dynamic", "bound": 0.85}
    one = torch.tensor([1])
    _, of_top_1 = unmasking.sdar_step(logits, ids, one, uniforms, mask_id=MASK, temperature=1.0, top_k=1, **options)  # type: ignore[arg-type]
    _, greedy = unmasking.sdar_step(logits, ids, one, None, mask_id=MASK, temperature=0.0, top_k=0, **options)  # type: ignore[arg-type]
    assert of_top_1.sum() == 3 and greedy.sum() == 1


def test_late_tokens_wait_at_every_temperature() -> None:
    logits, ids = torch.zeros(1, 3, VOCABULARY), torch.full((1, 3), MASK)
    logits[0, 1, 5] = 30.0  # as sure as can be of the token that is to wait
    logits[0, 0, 1], logits[0, 2, 2] = 4.0, 3.0
    uniforms = torch.full(logits.shape, 0.5)
    for temperature in (0.0, 0.5):
        _, accepted = unmasking.llada_step(
            logits, ids, torch.tensor([2]), uniforms, None, mask_id=MASK, temperature=temperature, late_ids=(5,)
        )
        assert accepted.tolist() == [[True, False, True]]


def test_random_remasking_takes_the_highest_draws() -> None:
    logits, ids = example()
    draws = torch.tensor([[0.9, 0.1, 0.5, 0.8, 0.3]])
    _, accepted = unmasking.llada_step(
        logits, ids, torch.tensor([2]), None, draws, mask_id=MASK, temperature=0.0, remasking="random"
    )
    assert accepted.tolist() == [[False, False, True, False, True]]


def test_dream_decides_none_then_one_in_each_step_and_at_last_two() -> None:
    config, logits = DreamDecodingConfig(mask_id=MASK, new_tokens=8, steps=8, algorithm="entropy"), torch.randn(1, 8, VOCABULARY)
    ids, counts = torch.full((1, 8), MASK), []
    for rate in config.rates:
        options = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "algorithm": "entropy", "alg_temp": 0.0}
        ids, accepted = unmasking.dream_step(logits, ids, None, None, mask_id=MASK, rate=rate, **options)  # type: ignore[arg-type]
        counts.append(int(accepted.sum()))
    assert counts == [0, 1, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("algorithm", ["origin", "maskgit_plus", "topk_margin", "entropy"])
@pytest.mark.parametrize(("temperature", "alg_temp"), [(0.0, 0.0), (0.8, 0.0), (0.8, 0.5)])
def test_the_steps_decide_the_same_in_torch_and_jax(algorithm: str, temperature: float, alg_temp: float) -> None:
    for seed in range(4):
        logits, ids = example(seed)
        uniforms = random.uniform((5, VOCABULARY), seed=seed, step=0, example=torch.arange(1), purpose=0)
        places = random.uniform((5,), seed=seed, step=0, example=torch.arange(1), purpose=1)
        options = {"mask_id": MASK, "rate": 0.7, "temperature": temperature, "top_k": 4, "top_p": 0.9, "alg_temp": alg_temp}
        new, _ = unmasking.dream_step(logits, ids, uniforms, places, algorithm=algorithm, **options)  # type: ignore[arg-type]
        arrays = [jnp.asarray(each.numpy()) for each in (logits, ids, uniforms, places)]
        other, _ = jax_unmasking.dream_step(*arrays, algorithm=algorithm, **options)  # type: ignore[arg-type]
        assert new.tolist() == np.asarray(other).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_masked": torch.zeros(2, 3)}, "is_masked must be bool, got float32"),
        ({"is_masked": torch.zeros(2, 4, dtype=torch.bool)}, r"is_masked must be \[batch_size=2, places=3\], got \(2, 4\)"),
        ({"counts": torch.zeros(3, dtype=torch.int64)}, r"counts must be \[batch_size=2\], got \(3,\)"),
        ({"counts": torch.zeros(2)}, "counts must be .*int64.*, got float32"),
        ({"strategy": "best"}, "strategy must be 'static' or .*, got 'best'"),
        ({"bound": "high"}, "bound must be a number, got 'high'"),
    ],
)
def test_bad_calls_are_told(change: dict, message: str) -> None:
    good = {"confidence": torch.zeros(2, 3), "is_masked": torch.zeros(2, 3, dtype=torch.bool)}
    options = {"counts": torch.zeros(2, dtype=torch.int64), "strategy": "static", "bound": 0.5}
    with pytest.raises((TypeError, ValueError), match=message):
        unmasking.choose_places(**good | options | change)


def test_a_step_without_its_draws_is_told() -> None:
    logits, ids = example()
    with pytest.raises(ValueError, match=r"uniforms must be given at temperature 1\.0, got None"):
        unmasking.llada_step(logits, ids, torch.tensor([1]), None, None, mask_id=MASK, temperature=1.0)
    with pytest.raises(ValueError, match="place_uniforms must be given where places are drawn, got None"):
        unmasking.llada_step(logits, ids, torch.tensor([1]), None, None, mask_id=MASK, temperature=0.0, remasking="random")
    with pytest.raises(ValueError, match=r"mask_id must be in 0.*6, got 7"):
        unmasking.llada_step(logits, ids, torch.tensor([1]), None, None, mask_id=VOCABULARY, temperature=0.0)
