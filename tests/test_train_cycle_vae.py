"""The step of text-latent diffusion with cycles: LGDLM's loss and numbers, its draws, cycles, what is frozen, its twin."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from cycle_models import KINDS, MODEL, STEP, batch_of, config_of, state_of
from stable_models import assert_same_to_rounding
from trained_models import to_jax
from wide_floats import float32_is_float64

from gaugeblock.reference.configs import CycleVAEConfig, TextLatentMMDiTConfig
from gaugeblock.reference.jax import random as jax_random
from gaugeblock.reference.jax import text_latent_mmdit as jax_model
from gaugeblock.reference.jax import train_cycle_vae as jax_trainer
from gaugeblock.reference.torch import random, text_latent_mmdit, training
from gaugeblock.reference.torch import train_cycle_vae as trainer

EPS = np.finfo(np.float64).eps
EACH = pytest.mark.parametrize("kind", KINDS)
BOTH = pytest.mark.parametrize("module", [trainer, jax_trainer], ids=["torch", "jax"])


def same_bits(actual, expected) -> bool:
    return set(actual) == set(expected) and all(np.array_equal(actual[name], each) for name, each in expected.items())


@pytest.fixture
def rounded_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws are float32 numbers, also where what is called float32 is made wider."""
    draw, of_float32 = trainer.draws, torch.Tensor.float

    def rounded(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", of_float32)
            return draw(*arguments, **options)

    monkeypatch.setattr(trainer, "draws", rounded)


@EACH
def test_steps_are_those_of_the_public_loop_on_the_public_model(kind, rounded_draws):
    pytest.importorskip("mmdit")
    from gaugeblock.conformance.peers.lgdlm_training import LgdlmTrainingLoop

    config = config_of(kind, ema=None, accumulation_steps=2, max_gradient_norm=0.1, adam_epsilon=1e-4)
    expected, batch = state_of(config), batch_of()
    actual = expected
    for _ in range(2):
        with float32_is_float64():
            actual, metrics = LgdlmTrainingLoop()(actual, *batch, config=config)
        expected, expected_metrics = trainer.train_step(expected, *batch, config=config)
        assert_same_to_rounding(vars(metrics), vars(expected_metrics), units=2**12)
        assert_same_to_rounding(actual, expected, units=2**16)


@pytest.mark.parametrize("kind", ["as it is published", "velocity", "latents"])
def test_gradients_reach_every_parameter_that_is_trained(kind):
    config = config_of(kind)
    shares = trainer.Shares(trainer.cycles_run(STEP, config=config))
    _, gradients = training.metrics_and_gradients(shares, state_of(config), batch_of(), config=config)
    assert set(gradients) == {name for name in text_latent_mmdit.state_shapes(MODEL) if "clusters" not in name}
    for name, each in gradients.items():
        assert each.abs().max() > 1e-9 or "residual_fns" in name, name  # the first connection mixes streams that are alike


@BOTH
def test_worked_numbers_of_losses_and_tables(module):
    wide = (lambda each: torch.tensor(each, dtype=torch.float64)) if module is trainer else jax.numpy.asarray
    with jax.enable_x64(True):

        def loss(one, other):
            return float(module.latent_losses(wide(one), wide(other)).mean())

        assert loss([[3.0, 4], [1, 0]], [[1.0, 0], [0, 2]]) == pytest.approx(0.7, rel=1e-12)
        assert loss([[0.0] * 4], [[1.0, 0, 0, 0]]) == pytest.approx(0.25, rel=1e-12)
        alphas, sigmas = (np.asarray(each) for each in module.rates(wide([0.0, 0.5, 0.98, 1.0])))
    np.testing.assert_allclose(alphas[:3], [0.99995, 0.7026051, 0.0311579], rtol=4e-6)
    np.testing.assert_allclose(alphas[3], 1.558329e-5, rtol=2e-4)  # published tables are of float32
    np.testing.assert_allclose(sigmas, [0.0100008, 0.7115800, 0.9995145, 1], rtol=1e-4)
    assert [float(module.ramp(step, 0.1, 5, 10)) for step in (4, 5, 6, 10, 15, 99)] == pytest.approx([0, 0, 0.01, 0.05, 0.1, 0.1])
    assert [float(module.ramp(step, 0.1, 5, 0)) for step in (4, 5)] == [0, pytest.approx(0.1)]


def toy_model(tokens, latents, _, times, mask):
    """Of 4 tokens."""
    numbers = tokens.double()
    logits = 0.1 * torch.arange(4) * latents.sum(1)[:, None, None] + 0.01 * numbers[..., None] * torch.tensor([1.0, -1, 2, 0])
    return logits, (0.5 * latents + 0.1 * numbers.mean(1, keepdim=True) + times[:, None])[:, None], logits[..., :0]


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (0.5, [0.8421580, 1.5872903, 1.4209329, 0.0433925, 1.8179386]),
        (1.0, [0.5862034, 1.5872903, 100, 0.0599512, 11.6519051]),
    ],
)
def test_a_worked_step(time, expected, monkeypatch):
    def drawn(latents, *_, is_cycle, **__):
        times = torch.tensor([time], dtype=torch.float64)
        noise = torch.tensor([[0.5, 2.0]] if is_cycle else [[1.0, -1.0]], dtype=torch.float64)
        return noise, times, *trainer.rates(times)

    chosen = []
    choose = trainer.pseudo_tokens
    monkeypatch.setattr(trainer, "draws", drawn)
    monkeypatch.setattr(trainer, "pseudo_tokens", lambda *of, **key: chosen.append(choose(*of, **key)) or chosen[-1])
    weights = dict.fromkeys(("latent_loss_weight", "cycle_text_weight", "cycle_latent_weight"), 0.1)
    ramps = {"cycle_text_ramp_steps": 0, "cycle_latent_ramp_steps": 0}
    config = CycleVAEConfig(TextLatentMMDiTConfig(vocab_size=4, latent_dim=2), 3, **weights, **ramps)
    batch = torch.tensor([[0, 1, 2]]), torch.tensor([[1.0, 2.0]], dtype=torch.float64), None, torch.tensor([0])
    parts = trainer.example_parts(toy_model, *batch, step=0, runs=(True, True), config=config)
    loss, parts = trainer.weighted({name: each.sum() for name, each in parts.items()}, 0, config=config)
    names = "base_t2l_latent_loss", "base_l2t_text_loss", "cycle_text_loss", "cycle_latent_loss"
    assert [float(each) for each in (*(parts[name] for name in names), loss)] == pytest.approx(expected, rel=1e-6)
    assert chosen[0].tolist() == [[3, 3, 3]]


@pytest.mark.parametrize(("step", "rate"), [(0, 2.5e-8), (1999, 5e-5), (2000, 5e-5), (51000, 2.75e-5), (100_000, 5e-6)])
def test_worked_learning_rates(step, rate):
    cosine = {"learning_rate_schedule": "cosine", "num_warmup_steps": 2000, "num_training_steps": 100_000}
    config = config_of("t2l", learning_rate=5e-5, first_warmup_step=1, final_learning_rate_ratio=0.1, **cosine)
    assert training.learning_rate_of(step, config) == pytest.approx(rate, rel=1e-12)
    assert float(jax_trainer.training.learning_rate_of(np.int32(step), config)) == pytest.approx(rate, rel=1e-12)


@BOTH
def test_cycles_take_turns_and_wait_for_their_ramps(module):
    ramps = {
        "cycle_text_warmup_steps": 2,
        "cycle_text_ramp_steps": 4,
        "cycle_latent_warmup_steps": 5,
        "cycle_latent_ramp_steps": 0,
    }
    both, turns = config_of("as it is published", **ramps), config_of("as it is published", **ramps, cycle_every=3)
    expected = [(0, 0), (0, 0), (0, 0), (0.125, 0), (0.25, 0), (0.375, 0.75), (0.5, 0.75), (0.5, 0.75)]
    steps = range(8) if module is trainer else map(jax.numpy.array, range(8))
    for step, (text, latent) in zip(steps, expected, strict=True):
        assert tuple(map(float, module.cycle_weights(step, config=both))) == (text, latent)
        is_latents = step // 3 % 2 == 1
        one = (0, latent) if is_latents else (text, 0)
        assert tuple(map(float, module.cycle_weights(step, config=turns))) == one
        assert module.cycles_run(step, config=turns) == tuple(each > 0 for each in one)
        assert not any(map(float, module.cycle_weights(step, config=replace(both, mode="t2l"))))


def test_before_their_ramps_and_without_weights_cycles_are_not_there():
    config, batch = config_of("as it is published"), batch_of()
    state, calls = state_of(config), []
    late = replace(config, cycle_text_warmup_steps=STEP, cycle_latent_warmup_steps=STEP)
    none = replace(config, cycle_text_weight=0.0, cycle_latent_weight=0.0)
    (one, metrics), (other, same) = (trainer.train_step(state, *batch, config=each) for each in (late, none))
    assert same_bits(one, other) and same_bits(vars(metrics), vars(same))
    assert metrics.cycle_text_loss == 0 and metrics.cycle_latent_loss == 0
    base = config.latent_loss_weight * metrics.base_t2l_latent_loss + metrics.base_l2t_text_loss
    torch.testing.assert_close(metrics.loss, base, rtol=4 * EPS, atol=0)
    model = torch.nn.Identity()
    model.forward = lambda *arrays: (
        calls.append(len(arrays[0]))
        or text_latent_mmdit.text_latent_mmdit(  # type: ignore[method-assign]
            training.part_of_state(state, "model"), *arrays, config=MODEL
        )
    )
    for runs, rows in (((False, False), [10]), ((True, False), [10, 5]), ((True, True), [10, 10])):
        calls.clear()
        trainer.example_parts(model, *batch, step=STEP, runs=runs, config=config)
        assert calls == rows


def test_the_cycle_through_a_latent_moves_what_predicted_it_only_if_asked():
    config, batch = config_of("as it is published"), batch_of()
    parameters = training.part_of_state(state_of(config), "model")
    leaves = {name: each.clone().requires_grad_() for name, each in parameters.items() if name.startswith("latent_head")}
    for is_cut in (True, False):
        asked = replace(config, cycle_stop_grad_latent=is_cut)
        model = lambda *of: text_latent_mmdit.text_latent_mmdit(parameters | leaves, *of, config=MODEL)  # noqa: E731
        parts = trainer.example_parts(model, *batch, step=STEP, runs=(True, False), config=asked)
        loss = parts["cycle_text_loss"].sum()
        assert is_cut or loss.requires_grad
        if loss.requires_grad:
            found = torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True)
            assert all(bool(each.any()) != is_cut for each in found)


def test_tokens_are_drawn_as_often_as_they_are_probable_and_chosen_without_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64).expand(4000, 3, 4)
    ids = torch.arange(4000)
    for temperature in (0.5, 2.0):
        config = config_of("velocity", cycle_latent_temperature=temperature)
        tokens = trainer.pseudo_tokens(logits, ids, 3, config=config)
        frequencies = torch.bincount(tokens.flatten(), minlength=4) / 12000
        expected = (logits[0, 0] / temperature).softmax(-1)
        assert (frequencies - expected).abs().max() < 5 * (0.25 / 12000) ** 0.5
        assert tokens[17].equal(trainer.pseudo_tokens(logits[:1], ids[17:18], 3, config=config)[0])
        assert not tokens.equal(trainer.pseudo_tokens(logits, ids, 4, config=config))
        assert (trainer.pseudo_tokens(logits[:5], ids[:5], 3, config=replace(config, cycle_latent_sampling="argmax")) == 2).all()


def test_draws_differ_between_examples_steps_and_passes_and_depend_on_nothing_else():
    config, latents, ids = config_of("as it is published", latent_t_min=0.25), torch.zeros(2000, 2), torch.arange(2000)
    kinds = []
    for is_cycle in (False, True):
        drawn = trainer.draws(latents, ids, 3, is_cycle=is_cycle, config=config)
        noise, times, alphas, sigmas = drawn
        some = torch.tensor([17, 3, 3, 1999])
        for each, whole in zip(trainer.draws(latents[:4], some, 3, is_cycle=is_cycle, config=config), drawn, strict=True):
            assert each.equal(whole[some])
        assert not noise.equal(trainer.draws(latents, ids, 4, is_cycle=is_cycle, config=config)[0])
        assert times.min() >= 0.25 and times.max() < 0.9 and abs(times.mean() - 0.575) < 5 * 0.65 / (12 * 2000) ** 0.5
        torch.testing.assert_close(alphas**2 + sigmas**2, torch.ones(2000))
        kinds += [noise[:, 0], noise[:, 1], times]
    assert abs(torch.corrcoef(torch.stack(kinds)) - torch.eye(6)).max() < 5 / 2000**0.5
    late = replace(config, latent_t_min=0.9999, latent_t_max=1.0)
    assert (trainer.draws(latents, ids, 3, is_cycle=False, config=late)[1] == torch.tensor(0.9999)).all()


@EACH
def test_order_and_microbatches_do_not_matter(kind):
    config, batch = config_of(kind), batch_of()
    state = state_of(config)
    expected, metrics = trainer.train_step(state, *batch, config=config)
    order = torch.tensor([3, 0, 4, 1, 2])
    for steps in (2, 3, 9):
        accumulated = replace(config, accumulation_steps=steps)
        actual, other = trainer.train_step(state, *(each[order] for each in batch), config=accumulated)
        assert_same_to_rounding(vars(other), vars(metrics), units=1024)
        assert_same_to_rounding(actual, expected, units=2**20)  # AdamW divides by gradients that may be small


@pytest.mark.parametrize("kind", ["velocity", "l2t"])
def test_a_run_is_repeated_resumed_and_recomputed_bit_for_bit(kind, tmp_path):
    config = config_of(kind, accumulation_steps=2, cycle_every=1)
    state, batches = state_of(config), [batch_of(size) for size in (5, 2, 4, 3)]

    def run(state, batches, config=config):
        for each in batches:
            state, _ = trainer.train_step(state, *each, config=config)
        return state

    copies = {name: each.clone() for name, each in state.items()}
    through = run(state, batches)
    assert same_bits(state, copies) and same_bits(run(state, batches), through)
    assert same_bits(run(state, batches, replace(config, activation_checkpointing=True)), through)
    training.save_state(run(state, batches[:2]), tmp_path / "run.safetensors", config=config)
    assert same_bits(run(training.load_state(tmp_path / "run.safetensors", config=config), batches[2:]), through)


def test_recomputation_keeps_fewer_bytes():
    totals = []
    for is_asked_for in (False, True):
        config, kept = config_of("as it is published", activation_checkpointing=is_asked_for), {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.train_step(state_of(config), *batch_of(), config=config)
        totals.append(sum(kept.values()))
    assert totals[0] > 1.5 * totals[1]


@pytest.mark.parametrize(
    ("mode", "groups"), [("t2l", ("text_encoder.", "text_head.")), ("l2t", ("latent_encoder.", "latent_head."))]
)
def test_single_modes_freeze_what_is_the_other_ones_own(mode, groups):
    config, batch = config_of(mode), batch_of()
    state = state_of(config)
    names = set(text_latent_mmdit.state_shapes(MODEL))
    frozen = {name for name in names if name.startswith((*groups, "text_head_clusters."))}
    assert set(trainer.frozen_names(config)) == frozen and {f"exp_avg.{name}" for name in frozen}.isdisjoint(state)
    new_state, metrics = trainer.train_step(state, *batch, config=config)
    changed = {
        name for name in text_latent_mmdit.state_shapes(MODEL) if not new_state[f"model.{name}"].equal(state[f"model.{name}"])
    }
    assert changed == set(text_latent_mmdit.state_shapes(MODEL)) - frozen
    others = {"t2l": "base_l2t_text_loss", "l2t": "base_t2l_latent_loss"}
    assert getattr(metrics, others[mode]) == 0 < metrics.loss
    in_cycles = trainer.frozen_names(config_of("velocity"))
    assert all(name.startswith("text_head_clusters.") for name in in_cycles) and len(in_cycles) == 2


BAD = {
    "latents": ("latent_norm", lambda state, batch: batch[1].__setitem__((2, 0), torch.nan)),
    "a latent that is infinite": ("latent_norm", lambda state, batch: batch[1].__setitem__((2, 0), -torch.inf)),
    "a prediction": ("latent_pred_norm", lambda state, batch: state["model.latent_head.3.bias"].__setitem__(1, torch.inf)),
    "logits": ("base_l2t_text_loss", lambda state, batch: state["model.text_head.bias"].__setitem__(1, torch.inf)),
    # 64,171 times a prediction of 1e305 is no number, and the text of such a latent is none
    "a predicted latent": ("x0_pred_norm", lambda state, batch: state["model.latent_head.3.bias"].__setitem__(1, 1e152)),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_not_finite_is_named_before_it_is_bounded(what):
    name, spoil = BAD[what]
    config = config_of("as it is published", latent_t_mode="full" if what == "a predicted latent" else "random")
    state, batch = state_of(config), batch_of()
    spoil(state, batch)
    with pytest.raises(FloatingPointError, match=rf"^step 7: {name} is not finite \(.*\bloss "):
        trainer.train_step(state, *batch, config=config)


def test_directions_of_what_is_nearly_nothing():
    latents = torch.tensor([[0, 0], [3e-10, -4e-10], [3e-8, 4e-8], [3, -4]], dtype=torch.float64)
    expected = torch.tensor([[0, 0], [0.03, -0.04], [0.6, 0.8], [0.6, -0.8]], dtype=torch.float64)
    torch.testing.assert_close(trainer.direction(latents), expected, rtol=1e-14, atol=0)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax_trainer.direction(to_jax(latents)), expected, rtol=1e-14)


@BOTH
def test_an_infinite_cross_entropy_is_not_bounded_and_a_large_one_is(module):
    logits = torch.tensor([[[0.0, 1e4]], [[0.0, torch.inf]], [[torch.nan, 0.0]], [[0.0, 3.0]]])
    ids = torch.zeros(4, 1, dtype=torch.int64)
    losses = module.text_losses(*((logits, ids) if module is trainer else to_jax((logits, ids))))
    assert float(losses[0]) == 100 and not np.isfinite(np.asarray(losses[1:3])).any()
    assert float(losses[3]) == pytest.approx(np.log1p(np.exp(3)))


def test_losses_are_computed_in_bfloat16_and_the_state_stays_wide():
    config, batch = config_of("latents", accumulation_steps=2), batch_of()
    narrow = {name: each.float() if each.is_floating_point() else each for name, each in state_of(config).items()}
    batch = [each.float() if each.is_floating_point() else each for each in batch]
    _, exact = trainer.train_step(narrow, *batch, config=config)
    state, rounded = trainer.train_step(narrow, *batch, config=replace(config, compute_dtype="bfloat16"))
    assert 0 < abs(rounded.loss / exact.loss - 1) < 0.05 and rounded.loss.dtype == torch.float32
    assert all(each.dtype == torch.float32 for name, each in state.items() if name != "step")


def test_the_loss_falls_from_the_start_of_a_run():
    config = config_of("latents", learning_rate=3e-2, cycle_text_ramp_steps=0, cycle_latent_ramp_steps=0, latent_t_mode="random")
    state, batch = trainer.initial_state(config), [each.float() if each.is_floating_point() else each for each in batch_of()]
    losses = []
    for _ in range(25):
        state, metrics = trainer.train_step(state, *batch, config=config)
        losses.append(float(metrics.base_l2t_text_loss))
    assert abs(losses[0] - np.log(12)) < 0.1  # logits begin near 0
    assert losses[-1] < 0.7 * losses[0]


def test_both_begin_with_the_same_parameters(monkeypatch):
    config = replace(config_of("as it is published"), model=replace(MODEL, num_residual_streams=3))
    state = training.part_of_state(trainer.initial_state(config), "model")
    for name, each in state.items():
        if "static_alpha" in name:
            assert each[:, 1:].equal(torch.eye(3)) and each[:, 0].sum() == 1 == each[:, 0].max()
    assert len({tuple(each[:, 0].tolist()) for name, each in state.items() if "static_alpha" in name}) > 1
    assert (state["mmdit.blocks.0.attn_layernorms.0.to_cond.2.bias"] == torch.tensor([1.0, 0]).repeat_interleave(8)).all()
    assert state["mmdit.blocks.0.attn_residual_fns.0.h_post_scale"] == torch.tensor(0.01)
    table = state["text_encoder.token_embed.weight"]
    assert 0.7 < table.std() < 1.3 and state["text_head.weight"].abs().max() < 0.1 and not state["text_head.bias"].any()
    inner = state["mmdit.blocks.0.feedforwards.0.ff.0.0.bias"]
    assert 0.9 * 8**-0.5 < inner.abs().max() <= 8**-0.5
    for name in ("normal", "uniform"):  # JAX compiles one draw for each shape
        of_torch = getattr(random, name)
        monkeypatch.setattr(
            jax_random, name, lambda *of, of_torch=of_torch, **key: jax.numpy.asarray(of_torch(*of, **key).numpy())
        )
    assert same_bits(jax_model.initial_state(config.model, seed=config.seed), state)


def test_torch_and_jax_make_the_same_steps_and_raise_alike():
    config = config_of("as it is published", accumulation_steps=2, cycle_latent_sampling="categorical", ema=None)
    state, batch = state_of(config), batch_of(4)
    with jax.enable_x64(True):
        jax_state, jax_batch = to_jax(state), to_jax(batch)
        for _ in range(2):
            state, metrics = trainer.train_step(state, *batch, config=config)
            jax_state, jax_metrics = jax_trainer.train_step(jax_state, *jax_batch, config=config)
            assert_same_to_rounding(vars(jax_metrics), vars(metrics), units=2**10)
        assert_same_to_rounding(jax_state, state, units=2**20)
        spoiled = jax_state | {"model.text_head.bias": jax_state["model.text_head.bias"].at[1].set(np.inf)}
        with pytest.raises(FloatingPointError, match=r"^step 9: base_l2t_text_loss is not finite"):
            jax_trainer.train_step(spoiled, *jax_batch, config=config)


def test_padding_is_not_seen_and_counts():
    ids, latents, mask, example_ids = batch_of()
    others = torch.where(mask, ids, (ids + 1) % 11)
    for mode, name in (("l2t", "base_l2t_text_loss"), ("t2l", "base_t2l_latent_loss")):
        config, shares = config_of(mode), trainer.Shares((False, False))
        one, other = (
            training.metrics_and_gradients(shares, state_of(config), (tokens, latents, mask, example_ids), config=config)[0]
            for tokens in (ids, others)
        )
        assert not mask.all() and (one[name] == other[name]) == (mode == "t2l")
