"""The image-diffusion training step of every model: torch and JAX, what is dropped, what stays, and beginnings."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from trained_models import MODELS, OPTIONS, batch_of, config_of, draws, state_of, to_jax

from gaugeblock.reference.configs import EMAConfig, MMDiTConfig, VAEConfig
from gaugeblock.reference.jax import image_models as jax_image_models
from gaugeblock.reference.jax import train_image_diffusion as jax_trainer
from gaugeblock.reference.torch import image_models, training, vae
from gaugeblock.reference.torch import train_image_diffusion as trainer

EPS = np.finfo(np.float64).eps
CASES = [("dit", "noise"), ("dit", "data"), ("dit_moe", "usual"), ("unet", "noise"), ("flux", "usual"), ("mmdit", "data")]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_torch_and_jax_make_the_same_steps(name, options):
    config = config_of(name, **OPTIONS[options])
    step, batch = batch_of(name)
    state = state_of(config)
    with jax.enable_x64(True):
        jax_state = to_jax(state)
        for _ in range(2):
            state, metrics = getattr(trainer, step)(state, *batch, config=config)
            jax_state, jax_metrics = getattr(jax_trainer, step)(jax_state, *to_jax(batch), config=config)
        for key, each in (vars(metrics) | state).items():
            other = np.asarray((vars(jax_metrics) | jax_state)[key])
            assert np.abs(other - each.numpy()).max() <= 1024 * EPS * max(float(each.abs().max()), 1e-300), key
    assert (metrics.auxiliary_loss > 0) == (name == "dit_moe")


@pytest.mark.parametrize("name", MODELS)
def test_both_begin_with_the_same_parameters_and_predict_0(name):
    config = MODELS[name]
    state, jax_state = (module.initial_state(config, seed=3) for module in (image_models, jax_image_models))
    assert list(state) == list(image_models.state_shapes(config)) == list(jax_state)
    for key, each in state.items():
        if key in image_models.frozen_names(config):  # a table of sines
            np.testing.assert_array_max_ulp(np.asarray(jax_state[key]), each.numpy(), 1)
        else:
            assert np.array_equal(jax_state[key], each), key
    _, batch = batch_of(name)
    told = (batch[1], None, None) if len(batch) == 3 else (None, *(None if each is None else each.float() for each in batch[1:3]))
    model = partial(image_models.operation(config), state, config=config)
    prediction, _ = image_models.predict(model, batch[0].float(), torch.full((5,), 300.0), *told, config=config)
    assert prediction.shape == batch[0].shape and (prediction == 0).all()


def test_the_table_of_positions_is_that_of_diffusers_and_is_not_trained():
    config = MODELS["mmdit"]
    sizes = {name: getattr(config, name) for name in (
        "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size",
    )}  # fmt: skip
    expected = SD3Transformer2DModel(**sizes).pos_embed.pos_embed
    assert isinstance(config, MMDiTConfig)
    torch.testing.assert_close(image_models.initial_state(config, seed=0)["pos_embed.pos_embed"], expected, rtol=0, atol=2e-7)
    run = config_of("mmdit", ema=EMAConfig())
    step, batch = batch_of("mmdit")
    state = state_of(run)
    new_state, _ = getattr(trainer, step)(state, *batch, config=run)
    changed = {
        name
        for name in training.part_of_state(state, "model")
        if not torch.equal(state[f"model.{name}"], new_state[f"model.{name}"])
    }
    assert set(image_models.state_shapes(config)) - changed == {"pos_embed.pos_embed"}


@pytest.mark.parametrize("name", ["unet", "flux", "mmdit"])
def test_a_dropped_text_is_not_seen_by_the_model(name):
    config = replace(config_of(name), label_dropout=1.0)
    step, (images, texts, pooled, ids) = batch_of(name)
    state = state_of(config)
    other = images, texts + 1, None if pooled is None else pooled - 1, ids
    results = [getattr(trainer, step)(state, *each, config=config)[0] for each in ((images, texts, pooled, ids), other)]
    assert all(torch.equal(results[0][key], each) for key, each in results[1].items())


@pytest.mark.parametrize("name", MODELS)
def test_microbatches_do_not_matter_but_for_the_load_of_experts(name):
    step, batch = batch_of(name)
    state = state_of(config_of(name))
    (_, one), (_, three) = (
        getattr(trainer, step)(state, *batch, config=config_of(name, accumulation_steps=number)) for number in (1, 3)
    )
    torch.testing.assert_close(three.loss, one.loss, rtol=64 * EPS, atol=0)
    if name != "dit_moe":
        torch.testing.assert_close(three.gradient_norm, one.gradient_norm, rtol=256 * EPS, atol=0)


def test_a_balance_of_samples_does_not_depend_on_microbatches():
    """As theirs of the batch does: each has the load of its own examples."""
    step, batch = batch_of("dit_moe")
    for per_sample in (False, True):
        config = config_of("dit_moe")
        layer = replace(config.model.moe, per_sample=per_sample)
        config = replace(config, model=replace(config.model, moe=layer))
        one, three = (
            vars(getattr(trainer, step)(state_of(config), *batch, config=replace(config, accumulation_steps=number))[1])
            for number in (1, 3)
        )
        for key in ("auxiliary_loss", "gradient_norm"):
            far = abs(float(three[key] / one[key]) - 1)
            assert far <= 256 * EPS if per_sample else far > 1e-6, key


def test_latents_are_drawn_by_example_shifted_and_scaled():
    config = VAEConfig(
        block_out_channels=(8,), norm_num_groups=2, layers_per_block=1, latent_channels=2, scaling_factor=0.5, shift_factor=0.25
    )
    state = {
        name: draws(*shape, seed=place) / max(1, shape[-1])
        for place, (name, shape) in enumerate(vae.encoder_shapes(config).items())
    }
    images, ids = draws(4, 3, 4, 4), torch.tensor([5, 9, 5, 2**32 - 1])
    latents = trainer.latents(state, images, ids, 3, seed=1, config=config)
    mean, logvar = vae.encode(state, images, config=config)
    noise = ((latents / 0.5 + 0.25) - mean) / torch.exp(logvar / 2)
    torch.testing.assert_close(noise[0], noise[2])
    assert not torch.allclose(noise[0], noise[1]) and abs(noise.mean()) < 5 / noise.numel() ** 0.5
    alone = trainer.latents(state, images[1:2], ids[1:2], 3, seed=1, config=config)
    torch.testing.assert_close(alone[0], latents[1], rtol=64 * EPS, atol=64 * EPS)
    with jax.enable_x64(True):
        of_jax = jax_trainer.latents(to_jax(state), to_jax(images), to_jax(ids), 3, seed=1, config=config)
    np.testing.assert_allclose(of_jax, latents, rtol=0, atol=1024 * EPS * float(latents.abs().max()))


@pytest.mark.parametrize("module", [trainer, jax_trainer], ids=["torch", "jax"])
@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("unet", lambda images, texts, pooled, ids: (images, texts[:, :, 1:], pooled, ids), "encoder_hidden_states must be"),
        (
            "unet",
            lambda images, texts, pooled, ids: (images, texts, texts[:, 0], ids),
            "pooled_projections must be None for a UNet",
        ),
        (
            "mmdit",
            lambda images, texts, pooled, ids: (images, texts, None, ids),
            "pooled_projections must be an array, got NoneType",
        ),
        ("flux", lambda images, texts, pooled, ids: (images[:, :, 0], texts, pooled, ids), "images must be"),
        ("mmdit", lambda images, texts, pooled, ids: (images, texts, pooled, ids[1:]), "example_ids must be"),
        (
            "mmdit",
            lambda images, texts, pooled, ids: (images[:0], texts[:0], pooled[:0], ids[:0]),
            "images must hold at least one",
        ),
        (
            "dit",
            lambda images, texts, pooled, ids: (images, texts, pooled, ids),
            "config.model must be told texts, got DiTConfig",
        ),
    ],
)
def test_bad_calls_are_told(module, name, bad, message):
    _, batch = batch_of("mmdit" if name == "dit" else name)
    state, batch = trainer.initial_state(config_of(name)), bad(*(None if each is None else each for each in batch))
    with jax.enable_x64(True), pytest.raises((TypeError, ValueError), match=message):
        if module is jax_trainer:
            state, batch = to_jax(state), to_jax(batch)
        module.train_step_on_texts(state, *batch, config=config_of(name))


def test_a_model_that_is_told_texts_takes_no_classes():
    _, batch = batch_of("dit")
    with pytest.raises(ValueError, match=r"config\.model must be told classes, got UNetConfig"):
        trainer.train_step(trainer.initial_state(config_of("unet")), *batch, config=config_of("unet"))


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_a_batch_does_not_matter(name):
    config, (step, batch) = config_of(name, accumulation_steps=1), batch_of(name)
    order, state = torch.tensor([3, 0, 4, 1, 2]), state_of(config_of(name))
    expected, metrics = getattr(trainer, step)(state, *batch, config=config)
    shuffled = [None if each is None else each[order] for each in batch]
    actual, other_metrics = getattr(trainer, step)(state, *shuffled, config=config)
    torch.testing.assert_close(other_metrics.gradient_norm, metrics.gradient_norm, rtol=256 * EPS, atol=0)
    for key, each in training.part_of_state(expected, "exp_avg").items():  # a tenth of the gradients
        atol = 1024 * EPS * float(metrics.gradient_norm)
        torch.testing.assert_close(actual[f"exp_avg.{key}"], each, rtol=0, atol=atol, msg=lambda told, key=key: f"{key}: {told}")


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_masters_stay_wide_and_the_scale_of_the_loss_changes_no_more_than_roundings(name, compute_dtype):
    step, batch = batch_of(name)
    batch = [each.float() if each is not None and each.is_floating_point() else each for each in batch]
    results = []
    for changes in ({}, {"loss_scale": 2.0**4}, {"compute_dtype": None}):
        config = config_of(name, **{"compute_dtype": compute_dtype, "accumulation_steps": 2, **changes})
        state = {key: each if key == "step" else each.float() for key, each in state_of(config).items()}
        new_state, metrics = getattr(trainer, step)(state, *batch, config=config)
        assert all(each.dtype == torch.float32 for key, each in new_state.items() if key != "step")
        results.append(new_state | vars(metrics))
    narrow, scaled, wide = results
    if compute_dtype == "bfloat16":
        assert all(torch.equal(scaled[key], each) for key, each in narrow.items())
    else:  # small gradients keep the bits that float16 takes from what is below 2**-14
        torch.testing.assert_close(scaled["gradient_norm"], narrow["gradient_norm"], rtol=2.0**-11, atol=0)
        assert torch.equal(scaled["loss"], narrow["loss"])
    far = abs(float(narrow["gradient_norm"] / wide["gradient_norm"]) - 1)
    assert 0 < far < 0.1  # rounding of the narrow dtype, and not more


@pytest.mark.parametrize("name", MODELS)
def test_what_a_step_reports_and_returns_is_its_own(name):
    config, (step, batch) = config_of(name, ema=EMAConfig()), batch_of(name)
    state = state_of(config)
    before = {key: each.clone() for key, each in state.items()}
    first, metrics = getattr(trainer, step)(state, *batch, config=config)
    told, kept = {key: each.clone() for key, each in vars(metrics).items()}, {key: each.clone() for key, each in first.items()}
    places = [each.untyped_storage().data_ptr() for each in (*state.values(), *first.values(), *vars(metrics).values())]
    assert len(set(places)) == len(places)
    for each in vars(metrics).values():
        assert not each.requires_grad
        each.mul_(1024)  # as one who scales what is reported
    again, more = getattr(trainer, step)(state, *batch, config=config)
    getattr(trainer, step)(first, *batch, config=config)
    assert all(torch.equal(state[key], each) for key, each in before.items())
    assert all(torch.equal(first[key], each) and torch.equal(again[key], each) for key, each in kept.items())
    assert all(torch.equal(vars(more)[key], each) for key, each in told.items())


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_is_saved_goes_on_bit_for_bit(name, tmp_path):
    config, (step, batch) = config_of(name, ema=EMAConfig(), num_warmup_steps=3, accumulation_steps=2), batch_of(name)
    through, _ = getattr(trainer, step)(state_of(config), *batch, config=config)
    training.save_state(through, tmp_path / "run.safetensors", config=config)
    loaded = training.load_state(tmp_path / "run.safetensors", config=config)
    for _ in range(2):
        through, _ = getattr(trainer, step)(through, *batch, config=config)
        loaded, _ = getattr(trainer, step)(loaded, *batch, config=config)
    assert set(loaded) == set(through)
    assert all(torch.equal(loaded[key], each) for key, each in through.items())


@pytest.mark.parametrize("max_gradient_norm", [1e-6, 0.5, 1e6])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_first_update_is_what_its_formula_says_at_any_norm(optimizer, max_gradient_norm):
    """From moments of 0: momentum_buffer = g; exp_avg / (1 - beta1) = g and exp_avg_sq / (1 - beta2) = g**2."""
    config = replace(config_of("dit", optimizer=optimizer), max_gradient_norm=max_gradient_norm, adam_epsilon=1e-3)
    step, (images, labels, ids) = batch_of("dit")
    state = {key: torch.zeros_like(each) if key.startswith(config.moments) else each for key, each in state_of(config).items()}
    new_state, metrics = getattr(trainer, step)(state, images, labels, ids, config=config)
    _, gradients = training.metrics_and_gradients(trainer.shares, state, (images, labels, None, None, ids), config=config)
    factor = min(1.0, max_gradient_norm / (float(metrics.gradient_norm) + 1e-6))
    for name, gradient in gradients.items():
        weight, clipped = state[f"model.{name}"], gradient * factor
        penalized = clipped if optimizer == "adamw" else clipped + config.weight_decay * weight
        if optimizer == "sgd":
            update, moments = penalized, {"momentum_buffer": penalized}
        else:
            update = penalized / (penalized.abs() + config.adam_epsilon)
            moments = {"exp_avg": (1 - config.beta1) * penalized, "exp_avg_sq": (1 - config.beta2) * penalized.square()}
        beside = config.weight_decay * weight if optimizer == "adamw" else 0
        moments["model"] = weight - config.learning_rate * (update + beside)
        for part, expected in moments.items():
            atol = 1e-13 * max(float(expected.abs().max()), 1e-300)
            torch.testing.assert_close(new_state[f"{part}.{name}"], expected, rtol=0, atol=atol)
