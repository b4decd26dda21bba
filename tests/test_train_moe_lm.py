"""The training step of an upcycled GPT-2: the public loop, its twin, its draws, its microbatches, saving and resuming."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # transformers imports triton, which then decorates

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from upcycled_models import CONFIG, MODEL, ONE, batch, padded, trained_state

from gaugeblock.conformance.peers.transformers_gpt2 import EmergenceTrainingLoop
from gaugeblock.reference.configs import IGNORED_LABEL, MOE_LM_PRESETS, MoELMConfig
from gaugeblock.reference.jax import train_moe_lm as jax_trainer
from gaugeblock.reference.jax import training as jax_training
from gaugeblock.reference.torch import noisy_routers, training, upcycled_gpt2
from gaugeblock.reference.torch import train_moe_lm as trainer

EPS = np.finfo(np.float64).eps
EXPERTS = upcycled_gpt2.expert_names(MODEL)
TRAININGS = {trainer: training, jax_trainer: jax_training}


def to_jax(tensors: Any) -> Any:
    return jax.tree.map(lambda each: jnp.asarray(each.numpy()), tensors)


def assert_equal_to_rounding(actual: Any, expected: Any, units: int) -> None:
    """States of two runs differ by no more than so many roundings of their largest number, in each tensor."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        largest = np.abs(np.asarray(tensor)).max(initial=0)
        assert np.abs(np.asarray(actual[name]) - np.asarray(tensor)).max(initial=0) <= units * EPS * largest, name


def same_bits(actual: Any, expected: Any) -> bool:
    return set(actual) == set(expected) and all(
        one.dtype == other.dtype and one.tobytes() == other.tobytes()
        for one, other in ((np.asarray(actual[name]), np.asarray(expected[name])) for name in expected)
    )


def run(state: Any, batches: Any, config: MoELMConfig, module: ModuleType = trainer) -> Any:
    for each in batches:
        state, _ = module.train_step(state, *each, config=config)
    return state


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("step", [0, 1, 4, 7])
def test_it_is_the_public_loop(top_k, step):
    """Every tensor of the state, at the learning rates of warm-up and cosine, with noise and after it; experts are left alone."""
    config = replace(CONFIG, model=replace(MODEL, top_k=top_k), max_gradient_norm=0.5)
    state, idle = trained_state(config, step=max(1, step)) | {"step": torch.tensor(step)}, 0
    for seed in range(3):
        expected, their_metrics = EmergenceTrainingLoop()(state, *batch(seed=seed), config=config)
        new_state, metrics = trainer.train_step(state, *batch(seed=seed), config=config)
        assert_equal_to_rounding(vars(metrics), vars(their_metrics), units=256)
        assert_equal_to_rounding(new_state, expected, units=1024)
        assert all(new_state[f"num_updates.{name}"].equal(expected[f"num_updates.{name}"]) for name in EXPERTS)
        idle += int((metrics.load == 0).sum())
        state = new_state
    assert idle > 0 and metrics.gradient_norm > 0.5


def test_experts_without_tokens_stay_as_they_are_bit_for_bit():
    state = trained_state()
    new_state, metrics = trainer.train_step(state, *batch(), config=ONE)
    assert 0 < (metrics.load == 0).sum() < metrics.load.numel()
    for load, index in zip(metrics.load, MODEL.moe_layers, strict=True):
        for name in (each for each in EXPERTS if each.startswith(f"transformer.h.{index}.")):
            for part in ("model", "exp_avg", "exp_avg_sq", "num_updates"):
                old, new = state[f"{part}.{name}"], new_state[f"{part}.{name}"]
                assert new[load == 0].equal(old[load == 0])
                changed = (new != old).flatten(1).any(1) if part != "num_updates" else new == old + 1
                assert changed[load > 0].all()


def test_a_row_is_updated_as_a_parameter_of_its_own():
    """By any optimizer, against torch.optim, whose parameters without a gradient are left alone; in float32, bit for bit."""
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for name in ("adamw", "adam", "sgd"):
        config = replace(ONE, optimizer=name, num_warmup_steps=0, learning_rate_schedule="constant", max_gradient_norm=1e9)
        state = training.initial_state({"w": rows, "b": rows[0]}, config=config, stacked=("w",))
        theirs = [torch.nn.Parameter(each.clone()) for each in (*rows, rows[0])]
        common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "foreach": False}
        optimizer = {
            "adamw": functools.partial(torch.optim.AdamW, eps=config.adam_epsilon),
            "adam": functools.partial(torch.optim.Adam, eps=config.adam_epsilon),
            "sgd": functools.partial(torch.optim.SGD, momentum=config.momentum),
        }[name](theirs, **common)
        jax_state = to_jax(state)
        for step, used in enumerate(([1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1])):
            gradients = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(step)), "b": rows[1]}
            mask = torch.tensor(used).bool()
            norm = training.global_norm(gradients)
            state = training.update(state, gradients, norm, config=config, used={"w": mask})
            for row, parameter in enumerate(theirs):
                parameter.grad = gradients["b"] if row == 3 else gradients["w"][row] if used[row] else None
            optimizer.step()
            assert torch.stack([each.detach() for each in theirs[:3]]).equal(state["model.w"])
            assert theirs[3].detach().equal(state["model.b"])
            updates = [optimizer.state[each].get("step", step + 1 if name == "sgd" else 0) for each in theirs[:3]]
            assert name == "sgd" or state["num_updates.w"].tolist() == [int(each) for each in updates]
            jax_used = {"w": jnp.asarray(mask.numpy())}
            jax_state = jax_training.update(jax_state, to_jax(gradients), jnp.asarray(norm.numpy()), config=config, used=jax_used)
            for each in state:
                np.testing.assert_allclose(jax_state[each], state[each], rtol=1e-5, atol=1e-6, err_msg=each)
        assert state["num_updates.w"].tolist() == [3, 2, 3]


@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 1, "model": replace(MODEL, top_k=2)}], ids=["top-1", "top-2"])
def test_torch_and_jax_make_the_same_steps(changes):
    config = replace(CONFIG, **changes)
    state, batches = trained_state(config, step=2), [padded(seed=seed) for seed in range(4)]
    with jax.enable_x64(True):
        jax_state = to_jax(state)
        for each in batches:
            state, metrics = trainer.train_step(state, *each, config=config)
            jax_state, jax_metrics = jax_trainer.train_step(jax_state, *to_jax(each), config=config)
            assert_equal_to_rounding(vars(jax_metrics), vars(metrics), units=256)
            assert_equal_to_rounding(jax_state, state, units=2048)
    assert (metrics.load == 0).sum() > 0


def test_the_noise_falls_on_a_line_over_a_quarter_of_the_run():
    """Worked numbers of the public schedule."""
    main = MOE_LM_PRESETS["moe-main"]
    for config, step, expected in (
        (main, 0, 0.1),
        (main, 1, 0.09996),
        (main, 625, 0.075),
        (main, 1250, 0.05),
        (main, 2499, 4e-5),
        (main, 2500, 0.0),
        (main, 9999, 0.0),
        (replace(main, num_training_steps=1000, anneal_fraction=0.025), 12, 0.052),
        (replace(main, num_training_steps=1000, anneal_fraction=0.025), 24, 0.004),
        (replace(CONFIG, num_training_steps=3), 0, 0.0),
        (replace(CONFIG, num_training_steps=None, learning_rate_schedule="constant"), 0, 0.0),
        (MOE_LM_PRESETS["no-lb"], 0, 0.0),
    ):
        assert trainer.noise_std_of(step, config=config) == pytest.approx(expected, rel=1e-12, abs=0)
        with jax.enable_x64(True):
            assert jax_trainer.noise_std_of(jnp.asarray(step), config=config) == pytest.approx(expected, rel=1e-12, abs=0)
    assert main.noised_steps == 2500 and replace(main, num_training_steps=1000, anneal_fraction=0.29).noised_steps == 290
    assert replace(CONFIG, num_training_steps=100, anneal_fraction=0.29).noised_steps == 28  # as int(100 * 0.29) is


def test_the_first_update_has_no_learning_rate_and_the_last_one_hardly_any():
    config = MOE_LM_PRESETS["moe-main"]
    rates = {step: training.learning_rate_of(step, config) for step in (0, 1, 500, 1000, 5500, 9999, 10000)}
    expected = {0: 0.0, 1: 5e-8, 500: 2.5e-5, 1000: 5e-5, 5500: 2.5e-5, 9999: 5e-5 * np.sin(np.pi / 18000) ** 2, 10000: 0.0}
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-18)
    state = trained_state() | {"step": torch.tensor(0)}
    new_state, _ = trainer.train_step(state, *batch(), config=ONE)
    assert all(new_state[name].equal(tensor) for name, tensor in state.items() if name.startswith("model."))
    assert (new_state["exp_avg.transformer.wte.weight"] != state["exp_avg.transformer.wte.weight"]).all()


def test_losses_of_worked_examples():
    logits = torch.tensor([[[[2.0, 1, 0, -1]], [[0, 0.5, 1, 0]], [[-1, 3, 1, 2]]]])  # [1, 3, 1, 4]
    model = replace(MODEL, num_experts=4, moe_layers=(0,))
    for top_k, balance in ((1, 1.141822), (2, 1.179139)):
        found = of_routing(logits, logits.softmax(-1), replace(CONFIG, model=replace(model, top_k=top_k)))
        assert float(found["balance_loss"]) == pytest.approx(balance, abs=1e-6)
        assert float(found["z_loss"]) == pytest.approx(7.025221, abs=1e-6)
        assert found["entropy"].tolist() == pytest.approx([(0.947537 + 1.294722 + 0.887543) / 3], abs=1e-6)
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])[None, :, None]
    for top_k, balance in ((1, 1.0125), (2, 1.06875)):
        config = replace(CONFIG, model=replace(model, num_experts=3, top_k=top_k))
        assert float(of_routing(probs.log(), probs, config)["balance_loss"]) == pytest.approx(balance, abs=1e-6)
    config = replace(CONFIG, model=replace(model, num_experts=2))
    rows = torch.tensor([[0.51, 0.49]] * 6 + [[0.0, 1.0]] * 4)[None, :, None]
    assert float(of_routing(rows, rows, config)["balance_loss"]) == pytest.approx(0.9224, abs=1e-6)  # 1 is no lower bound
    zeros = torch.zeros(1, 2, 1, 8)
    found = of_routing(zeros, zeros.softmax(-1), replace(CONFIG, model=replace(model, num_experts=8)))
    assert float(found["z_loss"]) == pytest.approx(4.324077, abs=1e-6)


def of_routing(logits: torch.Tensor, probs: torch.Tensor, config: MoELMConfig) -> dict[str, torch.Tensor]:
    """Return the losses of a sequence whose router said this, and the mean entropy."""
    _, num_tokens, _, num_experts = logits.shape
    labels = torch.zeros(1, num_tokens, dtype=torch.int64)
    clean = logits.softmax(-1)
    entropy = -(clean * torch.log(clean + 1e-9)).sum(-1)
    load = (
        torch.bincount(probs.topk(config.model.top_k).indices.flatten(), minlength=num_experts) / num_tokens / config.model.top_k
    )
    outputs = (torch.zeros(1, num_tokens, 11), logits, probs, entropy, load[None, None])
    weights = trainer.label_weights(labels, dtype=torch.float32)
    return trainer.shares_of_outputs(outputs, labels, weights, torch.ones(1), load[None], config=config)[1]


def test_the_loss_at_the_start_is_that_of_the_dense_model():
    """With exact copies; with their perturbation nearly."""
    dense_model = replace(MODEL, moe_layers=())
    dense = {name.removeprefix("model."): each for name, each in trained_state(replace(CONFIG, model=dense_model)).items()}
    dense = {name: dense[name] for name in upcycled_gpt2.state_shapes(dense_model)}
    start = trainer.initial_state(dense, config=replace(CONFIG, model=dense_model))
    _, expected = trainer.train_step(start, *padded(), config=replace(CONFIG, model=dense_model))
    assert expected.balance_loss == expected.z_loss == 0 and expected.load.shape == (0, 13)
    for std, tolerance in ((0.0, 1e-12), (1e-3, 1e-2)):
        parameters = upcycled_gpt2.upcycled_state(dense, config=MODEL, seed=0, perturbation_std=std)
        _, metrics = trainer.train_step(trainer.initial_state(parameters, config=CONFIG), *padded(), config=CONFIG)
        assert float(metrics.lm_loss) == pytest.approx(float(expected.lm_loss), rel=tolerance)


def test_noise_is_of_an_example_a_step_and_a_token_and_of_nothing_else():
    ids = torch.arange(50)
    drawn = trainer.noise(ids, 4, 3, dtype=torch.float64, config=CONFIG)
    assert drawn.shape == (50, 4, 2, 13) and len(drawn.unique()) > 0.99 * drawn.numel()
    deviation = noisy_routers.noise_std_at(3, 20, 0.25, 0.5)
    assert deviation == pytest.approx(0.2) and abs(drawn.std() / deviation - 1) < 5 / drawn.numel() ** 0.5
    assert abs(drawn.mean()) < 5 * deviation / drawn.numel() ** 0.5
    some = torch.tensor([17, 3, 3, 49])
    assert trainer.noise(some, 4, 3, dtype=torch.float64, config=CONFIG).equal(drawn[some])
    assert trainer.noise(ids, 2, 3, dtype=torch.float64, config=CONFIG).equal(drawn[:, :2])
    for other in (replace(CONFIG, seed=1), CONFIG):
        later = trainer.noise(ids, 4, 3 if other.seed else 4, dtype=torch.float64, config=other)
        assert abs(torch.corrcoef(torch.stack([later.flatten(), drawn.flatten()]))[0, 1]) < 5 / drawn.numel() ** 0.5


@pytest.mark.parametrize("module", TRAININGS)
def test_noise_ends_with_its_part_of_a_training_of_known_length(module):
    deviations = [float(module.noise_std_of(step, config=CONFIG)) for step in (0, 3, 5, 6)]
    assert deviations == pytest.approx([0.5, 0.2, 0, 0])
    endless = replace(CONFIG, num_training_steps=None, anneal_fraction=1.0, learning_rate_schedule="constant")
    assert module.noise_std_of(0, config=endless) == 0


def test_an_exhausted_noise_changes_nothing():
    state = trained_state(step=5)
    results = [trainer.train_step(state, *batch(), config=replace(CONFIG, noise_std=std))[0] for std in (0.5, 0.0)]
    assert same_bits(*results)
    before = [trainer.train_step(trained_state(step=4), *batch(), config=replace(CONFIG, noise_std=std))[0] for std in (0.5, 0.0)]
    assert not same_bits(*before)


@pytest.mark.parametrize("accumulation_steps", [2, 3, 9])
def test_order_and_microbatches_do_not_matter_but_for_the_balance(accumulation_steps):
    """Whose product of means is of a microbatch; without it, microbatches of other sizes and numbers of labels sum up alike."""
    plain = replace(ONE, balance_coefficient=0.0)
    state, (input_ids, labels, ids) = trained_state(), padded()
    order = torch.tensor([3, 0, 4, 1, 2])
    expected, metrics = trainer.train_step(state, input_ids, labels, ids, config=plain)
    config = replace(plain, accumulation_steps=accumulation_steps)
    actual, other_metrics = trainer.train_step(state, input_ids[order], labels[order], ids[order], config=config)
    assert_equal_to_rounding(actual, expected, units=256)
    assert_equal_to_rounding(
        {name: each for name, each in vars(other_metrics).items() if name != "balance_loss"},
        {name: each for name, each in vars(metrics).items() if name != "balance_loss"},
        units=64,
    )
    assert other_metrics.balance_loss != metrics.balance_loss


def test_order_does_not_matter_to_one_microbatch():
    state, (input_ids, labels, ids) = trained_state(), padded()
    order = torch.tensor([3, 0, 4, 1, 2])
    expected, metrics = trainer.train_step(state, input_ids, labels, ids, config=ONE)
    actual, other_metrics = trainer.train_step(state, input_ids[order], labels[order], ids[order], config=ONE)
    assert_equal_to_rounding(actual, expected, units=256)
    assert_equal_to_rounding(vars(other_metrics), vars(metrics), units=64)


def test_the_balance_of_microbatches_weighs_by_their_examples():
    state, (input_ids, labels, ids) = trained_state(), padded()
    parts = [[each[:3] for each in (input_ids, labels, ids)], [each[3:] for each in (input_ids, labels, ids)]]
    _, metrics = trainer.train_step(state, input_ids, labels, ids, config=CONFIG)
    losses = [trainer.train_step(state, *part, config=ONE)[1].balance_loss for part in parts]
    torch.testing.assert_close(metrics.balance_loss, (3 * losses[0] + 2 * losses[1]) / 5, rtol=16 * EPS, atol=0)


def test_the_loss_is_the_mean_over_labels_that_count():
    state, (input_ids, labels, ids) = trained_state(), padded()
    drawn = trainer.noise(ids, 4, 7, dtype=torch.float64, config=CONFIG)
    parameters = training.part_of_state(state, "model")
    logits = upcycled_gpt2.upcycled_gpt2(parameters, input_ids, drawn, training=True, config=MODEL)[0]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    _, metrics = trainer.train_step(state, input_ids, labels, ids, config=CONFIG)
    torch.testing.assert_close(metrics.lm_loss, expected, rtol=16 * EPS, atol=0)


def test_blocks_that_are_computed_again_give_the_same_bits():
    state = trained_state()
    results = [
        trainer.train_step(state, *padded(), config=replace(CONFIG, activation_checkpointing=each)) for each in (True, False)
    ]
    assert same_bits(results[0][0], results[1][0]) and same_bits(vars(results[0][1]), vars(results[1][1]))


@pytest.mark.parametrize("module", [trainer, jax_trainer], ids=["torch", "jax"])
def test_a_step_is_replayed_and_a_saved_run_resumes_bit_for_bit(module, tmp_path):
    batches = [padded(seed=seed) for seed in range(4)]
    with jax.enable_x64(True):
        start = trained_state()
        if module is jax_trainer:
            start, batches = to_jax(start), to_jax(batches)
        through = run(start, batches, CONFIG, module)
        half = run(start, batches[:2], CONFIG, module)
        TRAININGS[module].save_state(half, tmp_path / "state.safetensors", config=CONFIG)
        loaded = TRAININGS[module].load_state(tmp_path / "state.safetensors", config=CONFIG)
        assert same_bits(loaded, half)
        assert same_bits(run(loaded, batches[2:], CONFIG, module), through)
        other = (jax_training if module is trainer else training).load_state(tmp_path / "state.safetensors")
        assert same_bits(other, half)


@pytest.mark.parametrize("module", [trainer, jax_trainer], ids=["torch", "jax"])
def test_what_is_not_finite_raises_with_the_step_and_its_name_and_nothing_is_updated(module):
    with jax.enable_x64(True):
        state, arrays = trained_state(), batch()
        state["model.transformer.ln_f.weight"][3] = torch.nan
        if module is jax_trainer:
            state, arrays = to_jax(state), to_jax(arrays)
        copy = {name: np.asarray(tensor).copy() for name, tensor in state.items()}
        with pytest.raises(FloatingPointError, match=r"^step 7: lm_loss is not finite \(.*lm_loss nan"):
            module.train_step(state, *arrays, config=CONFIG)
        assert all(np.array_equal(np.asarray(state[name]), copy[name], equal_nan=True) for name in copy)


def test_a_batch_without_labels_raises():
    input_ids, labels, ids = batch()
    with pytest.raises(FloatingPointError, match="step 7: lm_loss is not finite"):
        trainer.train_step(trained_state(), input_ids, torch.full_like(labels, IGNORED_LABEL), ids, config=CONFIG)


def test_in_bfloat16_the_state_stays_as_it_is():
    config = replace(CONFIG, compute_dtype="bfloat16", balance_coefficient=0.0)
    state = {name: each.float() if each.is_floating_point() else each for name, each in trained_state().items()}
    new_state, metrics = trainer.train_step(state, *padded(), config=config)
    _, wide = trainer.train_step(state, *padded(), config=replace(config, compute_dtype=None))
    assert {name: each.dtype for name, each in new_state.items()} == {name: each.dtype for name, each in state.items()}
    assert metrics.lm_loss.dtype == torch.float32
    assert 0 < abs(metrics.lm_loss / wide.lm_loss - 1) < 0.03


def test_it_learns_and_the_balance_loss_evens_the_load():
    generator = torch.Generator().manual_seed(0)
    model = replace(MODEL, num_experts=4)
    shapes = upcycled_gpt2.state_shapes(replace(model, moe_layers=()))
    dense = {
        name: torch.ones(shape) if ".ln_" in name and name.endswith("weight") else 0.2 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    parameters = upcycled_gpt2.upcycled_state(dense, config=model, seed=0)
    input_ids, labels, ids = batch(16)
    figures = {}
    for coefficient in (0.0, 0.1):
        config = replace(ONE, model=model, balance_coefficient=coefficient, num_training_steps=60, noise_std=0.1)
        state, reported = trainer.initial_state(parameters, config=config), []
        for _ in range(60):
            state, metrics = trainer.train_step(state, input_ids, labels, ids, config=config)
            reported.append(metrics)
        assert reported[-1].lm_loss < 0.6 * reported[0].lm_loss
        figures[coefficient] = reported[-1].balance_loss
    assert figures[0.1] < figures[0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance_coefficient": -0.1}, "balance_coefficient must be 0 or more"),
        ({"z_coefficient": float("nan")}, "z_coefficient must be 0 or more"),
        ({"noise_std": float("inf")}, "noise_std must be 0 or more and finite"),
        ({"anneal_fraction": 1.5}, "anneal_fraction must be in"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_a_bad_config_is_rejected_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_presets_are_the_public_runs():
    steps = {name: config.num_training_steps for name, config in MOE_LM_PRESETS.items()}
    assert steps == {"moe-main": 10000, "top2": 3000, "no-lb": 2000, "dense": 5000}
    assert [each.num_warmup_steps for each in MOE_LM_PRESETS.values()] == [1000, 300, 200, 500]
