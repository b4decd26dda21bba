"""The trained language model writes what the text is like, by every way to decode it, and JAX writes the same."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

DEMO = Path(__file__).parents[1] / "demo"


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(DEMO))
    try:
        import sample_text

        yield sample_text
    finally:
        sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def parameters(demo):
    return demo.load(demo.FILE)


@pytest.fixture(scope="module")
def held_out(demo):
    return demo.texts.texts()[1]


def test_the_text_is_split_and_comes_back(demo):
    trained_on, held_out = demo.texts.texts()
    assert 14 < len(trained_on) / len(held_out) < 17 and not set(trained_on + held_out) - set(demo.texts.ALPHABET)
    assert demo.texts.decode(demo.texts.encode(held_out[:100])) == held_out[:100]


def test_sequences_are_of_the_text_and_begin_everywhere(demo):
    trained_on, held_out = demo.texts.texts()
    starts = []
    for tokens, labels, samples, ids in demo.texts.batches(40, 16, 64, seed=3):
        assert labels.equal(tokens) and not samples.any() and tokens.shape == (16, 64)
        for row, start in zip(tokens, ids.tolist(), strict=True):
            assert demo.texts.decode(row) == trained_on[start : start + 64]
        starts += ids.tolist()
    assert len(set(starts)) == 640 and abs(np.mean(starts) / len(trained_on) - 0.5) < 5 * (1 / 12 / 640) ** 0.5
    tokens, *_ = demo.texts.of_sequences(held_out, 64)
    assert "".join(map(demo.texts.decode, tokens)) == held_out[: len(held_out) // 64 * 64]


def test_the_model_knows_held_out_text_far_better_than_how_often_characters_stand(demo, parameters, held_out):
    from train_text import bits_per_character

    bits = bits_per_character(parameters, held_out[: 4 * demo.texts.STRETCH], draws=4)
    assert bits < 0.7 * demo.texts.unigram_bits(held_out), bits


def test_samples_of_every_way_are_like_the_text(demo, parameters, held_out):
    prompts = demo.prompts_of(held_out, 6, 16)
    seen = {}
    for name, how in demo.ways(32).items():
        ids, passes = demo.sample(parameters, prompts, 32, how)
        assert ids.shape == (6, 32) and not (ids == demo.texts.MASK_ID).any(), name
        samples = [demo.texts.decode(row) for row in ids]
        _, seen[name] = demo.texts.likeness(samples)
        assert passes <= 32, name
    assert min(seen.values()) > LEAST_KNOWN, seen


def test_characters_drawn_by_how_often_they_stand_are_not(demo, held_out):
    drawn = np.random.default_rng(0).choice(list(held_out), size=(6, 32))
    assert demo.texts.likeness(["".join(row) for row in drawn])[1] < LEAST_KNOWN - 0.2


def test_without_draws_lladas_loop_decides_as_sdars_with_a_cache(demo, parameters, held_out):
    prompts, ways = demo.prompts_of(held_out, 4, 32), demo.ways(16)
    one, other = (
        demo.sample(parameters, prompts, 16, demo.replace(ways[name], temperature=0.0))[0]
        for name in ("SDAR, static", "LLaDA, low confidence")
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["SDAR, dynamic", "SDAR, entropy-bounded", "LLaDA, low confidence", "Dream, entropy"])
def test_jax_writes_the_same_from_the_same_draws(demo, parameters, held_out, name):
    state = {each: tensor.double() for each, tensor in parameters.items()}
    prompts, how = demo.prompts_of(held_out, 2, 8), demo.ways(8)[name]
    expected, passes = demo.sample(state, prompts, 8, how)
    with jax.enable_x64(True):
        made, as_many = demo.sample(state, prompts, 8, how, demo.JAX)
    assert made.tolist() == expected.tolist() and as_many == passes


def test_both_frameworks_learn_along_the_same_curve_and_leave_a_model(demo, monkeypatch, tmp_path, capsys):
    """A few steps of a smaller model: float32's rounding errors have not grown by then."""
    import train_text

    smaller = demo.replace(demo.MODEL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    monkeypatch.setattr(train_text, "MODEL", smaller)
    monkeypatch.setattr(train_text, "BATCH_SIZE", 8)
    monkeypatch.setattr(train_text, "LENGTH", 32)
    in_torch, in_jax = (train(40, lambda loss: None) for train in (train_text.train_torch, train_text.train_jax))
    np.testing.assert_allclose(in_jax.losses, in_torch.losses, rtol=1e-3)
    assert in_torch.losses[:5].mean() > 4 and in_torch.losses[-10:].mean() < 3.6
    assert in_torch.state.keys() == in_jax.state.keys() and int(in_torch.state["step"]) == int(in_jax.state["step"]) == 40

    assert train_text.finish({"PyTorch": in_torch, "JAX": in_jax}, 1e-3 * in_jax.losses, tmp_path, 40) == 0
    assert "curves: within" in capsys.readouterr().out
    assert (tmp_path / "text_loss.png").read_bytes().startswith(b"\x89PNG")
    for name, each in demo.load(tmp_path / "text_model.safetensors").items():
        torch.testing.assert_close(each, in_torch.state[f"model.{name}"], rtol=1e-3, atol=1e-6)
    beyond = {"PyTorch": in_torch, "JAX": demo.replace(in_jax, losses=in_jax.losses * 1.01)}
    assert not train_text.training.report(beyond, 1e-3 * in_jax.losses, train_text.STATED_LOSS, is_whole=False)


LEAST_KNOWN = 0.7  # of what is three characters long in samples
