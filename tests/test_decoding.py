"""Loops that decode: against the public ones written out in lists, their passes, their ends, and the twins."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gaugeblock.reference import purposes
from gaugeblock.reference.configs import DreamDecodingConfig, LLaDADecodingConfig, SDARDecodingConfig
from gaugeblock.reference.jax import decoding as jax_decoding
from gaugeblock.reference.torch import decoding, dream, random, unmasking

MASK, VOCABULARY = 9, 10
TABLE = np.random.default_rng(0).normal(size=(64, VOCABULARY, VOCABULARY))


def logits_of(ids: np.ndarray) -> np.ndarray:
    """A model in float64 in which each place hears of every other, by how far it is."""
    places = np.arange(ids.shape[1])
    distance = places[:, None] - places[None, :] + 32
    return np.stack([TABLE[distance, row[None, :]].sum(1) * 0.5 for row in ids]).astype(np.float32)


def torch_model(ids: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(logits_of(ids.numpy()))


def jax_model(ids: Any) -> Any:
    return jnp.asarray(logits_of(np.asarray(ids)))


class Cached:
    """The same model, block-causal, with a cache that is the finished ids; it counts its passes."""

    def __init__(self, to_array: Callable, stop_at: int | None = None) -> None:
        self.to_array, self.stop_at = to_array, stop_at
        self.passes: list[str] = []
        self.model = {"prefill": self.prefill, "denoise": self.denoise, "store": self.store}

    def prefill(self, ids: Any) -> tuple[np.ndarray, ...]:
        self.passes.append("prefill")
        return (np.asarray(ids),)

    def denoise(self, cache: tuple[np.ndarray, ...], ids: Any) -> Any:
        self.passes.append("denoise")
        whole = np.concatenate([*cache, np.asarray(ids)], 1)
        return self.to_array(logits_of(whole)[:, -ids.shape[1] :])

    def store(self, cache: tuple[np.ndarray, ...], ids: Any) -> tuple[np.ndarray, ...]:
        self.passes.append("store")
        assert not (np.asarray(ids) == MASK).any(), "a noisy block is never stored"
        return (*cache, np.asarray(ids))


def draws(shape: tuple[int, ...], step: int, purpose: int) -> list:
    return random.uniform(shape, seed=5, step=step, example=0, purpose=purpose).tolist()


def softmax(row: list[float]) -> list[float]:
    highest = max(row)
    weights = [math.exp(each - highest) for each in row]
    return [each / sum(weights) for each in weights]


def draw(row: list[float], uniforms: list[float], temperature: float) -> tuple[int, float]:
    """A token that is not the mask, and its probability without temperature."""
    row = [-math.inf if v == MASK else each for v, each in enumerate(row)]
    scores = row
    if temperature > 0:
        scores = [z / temperature - math.log(-math.log(u)) if u > 0 else -math.inf for z, u in zip(row, uniforms, strict=True)]
    token = max(range(len(row)), key=lambda v: scores[v])
    return token, softmax(row)[token]


PROMPTS = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3], [4, 4, 0, 0, 1, 1, 8, 8, 2, 2, 5, 5]])
EXAMPLES = torch.tensor([0, 7])


@pytest.mark.parametrize(("steps", "temperature", "cfg_scale"), [(8, 0.0, 0.0), (4, 0.0, 1.5), (6, 0.8, 0.0), (2, 1.0, 0.5)])
def test_llada_is_the_public_loop(steps: int, temperature: float, cfg_scale: float) -> None:
    config = LLaDADecodingConfig(
        mask_id=MASK, new_tokens=8, block_length=4, steps=steps, temperature=temperature, cfg_scale=cfg_scale
    )
    prompt = PROMPTS[:1, :5]
    x = [*prompt[0].tolist(), *[MASK] * 8]
    for block in range(2):
        start = 5 + 4 * block
        quota = [4 // (steps // 2) + (i < 4 % (steps // 2)) for i in range(steps // 2)]
        for step in range(steps // 2):
            logits = logits_of(np.array([x]))[0].tolist()
            if cfg_scale > 0:
                without = logits_of(np.array([[MASK] * 5 + x[5:]]))[0].tolist()
                logits = [
                    [u + (cfg_scale + 1) * (z - u) for z, u in zip(*rows, strict=True)]
                    for rows in zip(logits, without, strict=True)
                ]
            uniforms = draws((4, VOCABULARY), block * (steps // 2) + step, purposes.TOKEN_DRAWS)
            found = {p: draw(logits[p], uniforms[p - start], temperature) for p in range(start, start + 4) if x[p] == MASK}
            for p in sorted(found, key=lambda p: -found[p][1])[: quota[step]]:
                x[p] = found[p][0]
    made = decoding.llada_generate(torch_model, prompt, EXAMPLES[:1], config=config, seed=5)
    assert made[0].tolist() == x and MASK not in x


@pytest.mark.parametrize("strategy", ["static", "dynamic", "sequential", "entropy_bounded"])
@pytest.mark.parametrize("prompt_length", [0, 1, 4, 6])
def test_sdar_is_the_public_loop_without_its_bugs(strategy: str, prompt_length: int) -> None:
    config = SDARDecodingConfig(
        mask_id=MASK,
        new_tokens=7,
        block_length=4,
        steps=3,
        temperature=0.9,
        strategy=strategy,
        threshold=0.4,
        entropy_bound=2.0,  # type: ignore[arg-type]
    )
    prompt = PROMPTS[:1, :prompt_length]
    length = -(-(prompt_length + 7) // 4) * 4
    x = [*prompt[0].tolist(), *[MASK] * (length - prompt_length)]
    for block in range(prompt_length // 4, length // 4):
        for step in range(4):
            masks = [p for p in range(4 * block, 4 * block + 4) if x[p] == MASK]
            if not masks:
                break
            logits = logits_of(np.array([x[: 4 * block + 4]]))[0].tolist()
            uniforms = draws((4, VOCABULARY), block * 4 + step, purposes.TOKEN_DRAWS)
            tempered = {p: [z / 0.9 for z in logits[p]] for p in masks}
            found = {p: draw(tempered[p], uniforms[p - 4 * block], 1.0) for p in masks}
            quota = min([2, 1, 1][min(step, 2)], len(masks))
            best = sorted(masks, key=lambda p: -found[p][1])
            if strategy == "sequential":
                kept = masks[:quota]
            elif strategy == "entropy_bounded":
                entropy = {}
                for p in masks:
                    probabilities = softmax([-math.inf if v == MASK else z for v, z in enumerate(logits[p])])
                    entropy[p] = -sum(q * math.log(q) for q in probabilities if q > 0)
                rising = sorted(masks, key=lambda p: entropy[p])
                kept = rising[: max(1, sum(sum(entropy[q] for q in rising[: k + 1]) < 2.0 for k in range(len(rising))))]
            else:
                sure = [p for p in masks if found[p][1] > 0.4]
                kept = sure if strategy == "dynamic" and len(sure) >= quota else best[:quota]
            for p in kept:
                x[p] = found[p][0]
    made = decoding.sdar_generate(
        decoding.CachedModel(**Cached(torch.from_numpy).model), prompt, EXAMPLES[:1], config=config, seed=5
    )
    assert made[0].tolist() == x[: prompt_length + 7]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_dream_is_the_public_loop(temperature: float) -> None:
    config = DreamDecodingConfig(mask_id=MASK, new_tokens=6, steps=4, temperature=temperature, algorithm="maskgit_plus", eps=1e-3)
    prompt = PROMPTS[:1, :3]
    x, times = [*prompt[0].tolist(), *[MASK] * 6], np.linspace(1, 1e-3, 5)
    for step in range(4):
        logits = logits_of(np.array([x]))[0].tolist()
        uniforms = draws((6, VOCABULARY), step, purposes.TOKEN_DRAWS)
        masks = [p for p in range(3, 9) if x[p] == MASK]
        tempered = {p: [z / (temperature or 1) for z in logits[p - 1]] for p in masks}
        found = {p: draw(tempered[p], uniforms[p - 3], 1.0 if temperature else 0.0) for p in masks}
        count = len(masks) if step == 3 else int(len(masks) * (1 - times[step + 1] / times[step]))
        for p in sorted(masks, key=lambda p: -found[p][1])[:count]:
            x[p] = found[p][0]
    made = decoding.dream_generate(lambda ids: dream.shift(torch_model(ids)), prompt, EXAMPLES[:1], config=config, seed=5)
    assert made[0].tolist() == x and MASK not in x


@pytest.mark.parametrize("prompt_length", range(9))
@pytest.mark.parametrize(("steps", "size"), [(1, 4), (2, 4), (3, 4), (4, 6), (6, 4)])
def test_sdar_never_touches_the_prompt_and_takes_a_pass_more_than_it_denoises(prompt_length: int, steps: int, size: int) -> None:
    """For every remainder of the prompt by the block and every quota; a block takes passes until its quotas reach its masks."""
    config = SDARDecodingConfig(mask_id=MASK, new_tokens=6, block_length=size, steps=steps, strategy="static", temperature=0.0)
    cached, prompts = Cached(torch.from_numpy), PROMPTS[:, :prompt_length]
    made = decoding.sdar_generate(decoding.CachedModel(**cached.model), prompts, EXAMPLES, config=config, seed=0)
    assert made.shape == (2, prompt_length + 6) and torch.equal(made[:, :prompt_length], prompts) and not (made == MASK).any()
    expected, quotas = ["prefill"], unmasking.quotas(torch.tensor([size]), steps=steps)[0].tolist()
    for block in range(prompt_length // size, -(-(prompt_length + 6) // size)):
        left, passes = size - max(0, prompt_length - size * block), 0
        while left > 0:
            left, passes = left - quotas[passes], passes + 1
        expected += ["denoise"] * passes + ["store"]
    assert cached.passes == expected


def test_sdar_ends_after_the_block_with_a_stop_id_and_other_rows_go_on() -> None:
    options: dict[str, Any] = {"mask_id": MASK, "new_tokens": 16, "block_length": 4, "steps": 4, "temperature": 0.0}
    run = [decoding.sdar_generate(_cached(), PROMPTS, EXAMPLES, config=SDARDecodingConfig(**options), seed=0)]
    stop = int(run[0][0, 13])  # the first row's second new token
    config = SDARDecodingConfig(**options, stop_ids=(stop,))
    both = decoding.sdar_generate(_cached(), PROMPTS, EXAMPLES, config=config, seed=0)
    for row in range(2):
        cached = Cached(torch.from_numpy)
        model, here = decoding.CachedModel(**cached.model), slice(row, row + 1)
        alone = decoding.sdar_generate(model, PROMPTS[here], EXAMPLES[here], config=config, seed=0)
        assert torch.equal(alone[0], both[row])
        new = run[0][row, 12:].tolist()
        end = 4 * (new.index(stop) // 4 + 1) if stop in new else 16
        assert cached.passes.count("store") == end // 4  # and no pass more
        assert both[row, 12:].tolist() == new[:end] + [MASK] * (16 - end)


def _cached() -> decoding.CachedModel:
    class Storing(Cached):
        def store(self, cache: tuple[np.ndarray, ...], ids: Any) -> tuple[np.ndarray, ...]:
            return (*cache, np.asarray(ids))  # a row that has ended holds masks

    return decoding.CachedModel(**Storing(torch.from_numpy).model)


CONFIGS = [
    LLaDADecodingConfig(mask_id=MASK, new_tokens=8, block_length=4, steps=6, temperature=0.7),
    LLaDADecodingConfig(mask_id=MASK, new_tokens=8, block_length=8, steps=4, cfg_scale=1.0, remasking="random"),
    SDARDecodingConfig(mask_id=MASK, new_tokens=7, block_length=4, steps=2, top_k=5, top_p=0.9, threshold=0.5),
    SDARDecodingConfig(
        mask_id=MASK, new_tokens=7, block_length=4, temperature=0.0, strategy="entropy_bounded", entropy_bound=2.0
    ),
    DreamDecodingConfig(mask_id=MASK, new_tokens=6, steps=5, temperature=0.6, top_p=0.9),
    DreamDecodingConfig(mask_id=MASK, new_tokens=6, steps=5, algorithm="topk_margin", alg_temp=0.4, top_k=6),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda each: type(each).__name__)
def test_torch_and_jax_make_the_same_tokens_and_a_row_does_not_know_its_batch(config: Any) -> None:
    name = {LLaDADecodingConfig: "llada_generate", SDARDecodingConfig: "sdar_generate", DreamDecodingConfig: "dream_generate"}[
        type(config)
    ]
    is_cached = name == "sdar_generate"

    def in_torch(rows: slice) -> torch.Tensor:
        model: Any = decoding.CachedModel(**Cached(torch.from_numpy).model) if is_cached else torch_model
        return getattr(decoding, name)(model, PROMPTS[rows, :6], EXAMPLES[rows], config=config, seed=3)

    model = jax_decoding.CachedModel(**Cached(jnp.asarray).model) if is_cached else jax_model
    prompts, examples = jnp.asarray(PROMPTS[:, :6].numpy()), jnp.asarray(EXAMPLES.numpy())
    other = getattr(jax_decoding, name)(model, prompts, examples, config=config, seed=3)
    both = in_torch(slice(0, 2))
    assert both.tolist() == np.asarray(other).tolist()
    assert both.shape == (2, 6 + config.new_tokens) and torch.equal(both[:, :6], PROMPTS[:, :6]) and not (both == MASK).any()
    assert both[1:].tolist() == in_torch(slice(1, 2)).tolist()


def test_an_empty_batch_is_an_ordinary_call() -> None:
    none, ids = torch.zeros(0, 6, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)

    def model(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, VOCABULARY)

    for loop, config in ((decoding.llada_generate, CONFIGS[0]), (decoding.dream_generate, CONFIGS[4])):
        assert loop(model, none, ids, config=config, seed=0).shape == (0, 6 + config.new_tokens)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (LLaDADecodingConfig, {"block_length": 3}, "new_tokens must be a multiple of block_length=3, got 128"),
        (LLaDADecodingConfig, {"block_length": 32, "steps": 6}, "steps must be a multiple of the number of blocks, 4, got 6"),
        (LLaDADecodingConfig, {"remasking": "none"}, "remasking must be 'low_confidence' or 'random', got 'none'"),
        (SDARDecodingConfig, {"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        (SDARDecodingConfig, {"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
        (SDARDecodingConfig, {"block_length": 0}, "block_length must be an integer of at least 1, got 0"),
        (DreamDecodingConfig, {"algorithm": "best"}, "algorithm must be 'origin' or .*, got 'best'"),
        (DreamDecodingConfig, {"eps": 0.0}, r"eps must be in \(0, 1\], got 0.0"),
    ],
)
def test_configs_that_cannot_be_are_told(kind: type, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**change)


def test_a_config_of_another_loop_is_told() -> None:
    with pytest.raises(TypeError, match="config must be a LLaDADecodingConfig, got DreamDecodingConfig"):
        decoding.llada_generate(torch_model, PROMPTS, EXAMPLES, config=CONFIGS[4], seed=0)  # type: ignore[arg-type]
