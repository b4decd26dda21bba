"""Training steps beside loops as public libraries have them, both in float64: states and metrics of several steps."""

from dataclasses import replace
from functools import partial

import pytest
import stable_models
import text_models
import torch
from stable_models import assert_same_to_rounding
from trained_models import batch_of, config_of, state_of
from wide_floats import float32_is_float64

from gaugeblock.conformance.peers import diffusers_stable_training
from gaugeblock.conformance.peers.diffusers_stable_training import DiffusersStableDiffusionLoop
from gaugeblock.conformance.peers.diffusers_training import DiffusersTrainingLoop
from gaugeblock.conformance.peers.transformers_training import TransformersTrainingLoop
from gaugeblock.reference.configs import EMAConfig
from gaugeblock.reference.torch import noise_schedules
from gaugeblock.reference.torch import train_block_diffusion as block_trainer
from gaugeblock.reference.torch import train_image_diffusion as trainer
from gaugeblock.reference.torch import train_stable_diffusion as stable_trainer

RUNS = {
    "adamw": {"ema": EMAConfig(), "accumulation_steps": 2},
    "adam": {"optimizer": "adam", "learning_rate_schedule": "cosine", "num_warmup_steps": 1, "num_training_steps": 5},
    "sgd": {"optimizer": "sgd", "velocity": "data - noise", "activation_checkpointing": True, "num_warmup_steps": 2},
}


FLOAT = torch.Tensor.float


@pytest.fixture(autouse=True)
def rounded_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws are float32 numbers, also where what is called float32 is made wider."""

    def rounded(draws, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", FLOAT)
            return draws(*arguments, **options)

    for module, name in ((trainer, "draws"), (trainer, "draw_latents"), (stable_trainer, "draws")):
        monkeypatch.setattr(module, name, partial(rounded, getattr(module, name)))


@pytest.mark.parametrize("run", RUNS)
def test_steps_are_those_of_the_loop_of_diffusers(run):
    config, (_, batch) = replace(config_of("mmdit", **RUNS[run]), max_gradient_norm=0.1, adam_epsilon=1e-4), batch_of("mmdit")
    expected = actual = state_of(config)
    for _ in range(3):
        with float32_is_float64():
            actual, metrics = DiffusersTrainingLoop()(actual, *batch, config=config)
        expected, expected_metrics = trainer.train_step_on_texts(expected, *batch, config=config)
    assert int(actual["step"]) == 3
    assert_same_to_rounding(actual | vars(metrics), expected | vars(expected_metrics), units=2**16)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("1", {"accumulation_steps": 2, "ema": EMAConfig()}),
        ("2", {"train_text_encoder": False, "activation_checkpointing": True}),
        ("xl", {"optimizer": "sgd", "activation_checkpointing": True}),
    ],
)
def test_steps_of_stable_diffusion_are_those_of_the_loop_of_diffusers(kind, changes, monkeypatch):
    config = stable_models.config_of(kind, max_gradient_norm=0.1, adam_epsilon=1e-4, **changes)
    table = noise_schedules.alphas_cumprod(config.schedule)
    scheduler = diffusers_stable_training.scheduler_of(config)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=5e-5, atol=1e-7)
    scheduler.alphas_cumprod = table  # theirs is of float32
    monkeypatch.setattr(diffusers_stable_training, "scheduler_of", lambda config: scheduler)

    frozen, batch = stable_models.frozen_of(config), stable_models.batch_of(config)
    expected = actual = stable_models.state_of(config)
    for _ in range(2):
        with float32_is_float64():
            actual, metrics = DiffusersStableDiffusionLoop()(actual, frozen, *batch, config=config)
        expected, expected_metrics = stable_trainer.train_step(expected, frozen, *batch, config=config)
    assert_same_to_rounding(actual | vars(metrics), expected | vars(expected_metrics), units=2**16)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bd3-lm", {"accumulation_steps": 2}),
        (
            "llada, tuned",
            {"optimizer": "adam", "learning_rate_schedule": "cosine", "num_warmup_steps": 1, "num_training_steps": 5},
        ),
        ("dream, linear", {"optimizer": "sgd", "num_warmup_steps": 2}),
    ],
)
def test_steps_are_those_of_a_loop_with_transformers(kind, changes, monkeypatch):
    config, batch = text_models.config_of(kind, max_gradient_norm=0.1, adam_epsilon=1e-4, **changes), text_models.batch_of()
    expected = text_models.state_of(config)
    actual, weighted = expected, {}
    for step in range(3):  # draws are float32 numbers, also where what is called float32 is made wider
        weighted[step] = block_trainer.weighted_batch(*batch, step, dtype=torch.float64, config=config)
    monkeypatch.setattr(block_trainer, "weighted_batch", lambda *arguments, **_: weighted[arguments[4]])
    for _ in range(3):
        with float32_is_float64():
            actual, metrics = TransformersTrainingLoop()(actual, *batch, config=config)
        expected, expected_metrics = block_trainer.train_step(expected, *batch, config=config)
        assert_same_to_rounding(vars(metrics), vars(expected_metrics), units=2**10)
    assert int(actual["step"]) == 3
    assert_same_to_rounding(actual, expected, units=2**16)
