"""The Stable Diffusion training step: diffusers' loss, its draws, what is told and trained, its twin, saving and resuming."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from stable_models import KINDS, SCHEDULES, VAE, XL, assert_same_to_rounding, batch_of, config_of, frozen_of, state_of
from trained_models import draws, same_bits, to_jax

from gaugeblock.reference import states
from gaugeblock.reference.configs import DIFFUSION_SCHEDULE_PRESETS, StableDiffusionConfig
from gaugeblock.reference.jax import image_models as jax_image_models
from gaugeblock.reference.jax import train_stable_diffusion as jax_trainer
from gaugeblock.reference.torch import clip_text, image_models, noise_schedules, training, unet, vae
from gaugeblock.reference.torch import train_stable_diffusion as trainer

EPS = np.finfo(np.float64).eps
EACH = pytest.mark.parametrize("kind", KINDS)


def of_diffusers(config: StableDiffusionConfig) -> DDPMScheduler:
    """Its scheduler, with tables in float64."""
    names = "num_train_timesteps beta_start beta_end beta_schedule prediction_type rescale_betas_zero_snr".split()
    scheduler = DDPMScheduler(**{name: getattr(config.schedule, name) for name in names})
    table = noise_schedules.alphas_cumprod(config.schedule)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), table, rtol=5e-5, atol=1e-7)
    scheduler.alphas_cumprod = table
    return scheduler


def loss_of_the_example(parameters, frozen, batch, config: StableDiffusionConfig, step: int = 7) -> torch.Tensor:
    """The loss as the examples of diffusers compute it, of all draws of a step."""
    images, input_ids, time_ids, ids = batch
    mean, logvar = vae.encode(states.part(frozen, "vae"), images, config=VAE)
    drawn = trainer.encode_images(frozen, images, ids, step, config=config)
    of_vae = (drawn / VAE.scaling_factor - mean) / torch.exp(0.5 * logvar)
    latents = (mean + torch.exp(0.5 * logvar) * of_vae) * VAE.scaling_factor
    assert abs(of_vae).max() < 7 and of_vae.std() > 0.5 and latents.shape[1] == VAE.latent_channels

    noise, added, timesteps, is_dropped = trainer.draws(latents, ids, step, config=config)
    scheduler = of_diffusers(config)
    noised = scheduler.add_noise(latents, added, timesteps)
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        target = noise if kind == "epsilon" else latents

    encoded = parameters | frozen
    hidden, pooled = zip(
        *(
            clip_text.clip_text(states.part(encoded, f"text_encoder{'_2' * place}"), input_ids[:, place], config=encoder)
            for place, encoder in enumerate(config.text_encoders)
        ),
        strict=True,
    )
    kept = (~is_dropped).double()
    told = [torch.cat(hidden, dim=-1) * kept[:, None, None]]
    if config.unet == XL:
        told += [pooled[-1] * kept[:, None], time_ids]
    model = unet.unet_text_time if config.unet == XL else unet.unet
    predicted = model(states.part(parameters, "unet"), noised, timesteps.double(), *told, config=config.unet)

    loss = torch.nn.functional.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
    if config.snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, config.snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        if kind != "sample":
            weights = weights / (snr if kind == "epsilon" else snr + 1)
        loss = loss * weights
    return loss.mean()


@EACH
def test_loss_and_gradients_are_those_of_the_public_example(kind):
    config = config_of(kind)
    state, frozen, batch = state_of(config), frozen_of(config), batch_of(config)
    leaves = {name: each.clone().requires_grad_() for name, each in training.part_of_state(state, "model").items()}
    loss = loss_of_the_example(leaves, frozen, batch, config)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, [*leaves.values()], materialize_grads=True), strict=True))

    _, metrics = trainer.train_step(state, frozen, *batch, config=config)
    # diffusers' compute_snr reads its table in float32
    torch.testing.assert_close(metrics.loss, loss.detach(), rtol=1e-6 if config.snr_gamma else 64 * EPS, atol=0)
    latents = trainer.encode_images(frozen, batch[0], batch[3], 7, config=config)
    texts = (None, None) if config.train_text_encoder else trainer.encode_texts(frozen, batch[1], config=config)
    ids = batch[1] if config.train_text_encoder else None
    _, found = training.metrics_and_gradients(trainer.shares, state, (latents, ids, *texts, *batch[2:]), config=config)
    assert set(found) == set(gradients) - set(trainer.unused_names(config))
    for name, each in gradients.items():
        if name not in found:
            assert not each.any(), name
        elif name.endswith("k_proj.bias"):
            assert abs(found[name]).max() < 1e-15  # softmax does not see what is added to all scores
        else:
            torch.testing.assert_close(found[name], each, rtol=0, atol=1e-6 * float(each.abs().max()))
            assert abs(each).max() > 1e-9, name  # gradients reach every parameter that is trained
    norm = torch.cat([each.flatten() for each in gradients.values()]).norm()
    torch.testing.assert_close(metrics.gradient_norm, norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("schedule", "timesteps", "expected"),
    [
        ("noise", [0, 250, 500], [0.004253724, 1, 1]),
        ("velocity", [0, 250, 500], [0.004250109, 0.6737923, 0.2763325]),
    ],
)
def test_weights_are_the_published_numbers(schedule, timesteps, expected):
    without_rescaling = replace(SCHEDULES[schedule], rescale_betas_zero_snr=False)
    config = config_of("1", schedule=without_rescaling, snr_gamma=5.0)
    alphas, sigmas, weights = trainer.rates(torch.tensor([*timesteps, 999]), config=config)
    # published ones are of float32 tables, which at timestep 0 leave 1 - alphas_cumprod four digits
    torch.testing.assert_close(weights[:1], torch.tensor(expected[:1], dtype=torch.float64), rtol=3e-5, atol=0)
    torch.testing.assert_close(weights[1:3], torch.tensor(expected[1:], dtype=torch.float64), rtol=1e-6, atol=0)
    squares = torch.tensor([0.999149978, 0.276332468, 0.00466009509], dtype=torch.float64)
    torch.testing.assert_close(alphas[[0, 2, 3]] ** 2, squares, rtol=1e-6, atol=0)
    torch.testing.assert_close(alphas**2 + sigmas**2, torch.ones(4, dtype=torch.float64), rtol=0, atol=2 * EPS)


def test_where_nothing_is_left_of_the_data_velocities_weigh_nothing_and_noise_is_refused():
    config = config_of("2", snr_gamma=5.0)
    alphas, sigmas, weights = trainer.rates(torch.tensor([0, 500, 999]), config=config)
    expected = torch.tensor([0.999149978, 0.241018638, 0], dtype=torch.float64)
    torch.testing.assert_close(alphas**2, expected, rtol=1e-6, atol=0)
    assert sigmas[2] == 1 and weights[2] == 0
    of_noise = replace(config.schedule, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"snr_gamma must be None where epsilon is predicted at a signal-to-noise ratio of 0"):
        replace(config, schedule=of_noise)
    assert replace(config, schedule=of_noise, snr_gamma=None).snr_gamma is None


def test_draws_differ_between_examples_steps_and_kinds_and_depend_on_nothing_else():
    config = config_of("1", noise_offset=0.5, input_perturbation=0.25, snr_gamma=None)
    latents, ids = torch.zeros(2000, 2, 2, 2), torch.arange(2000)
    noise, added, timesteps, is_dropped = trainer.draws(latents, ids, 3, config=config)
    some = torch.tensor([17, 3, 3, 1999])
    for drawn, whole in zip(
        trainer.draws(latents[:4], some, 3, config=config), (noise, added, timesteps, is_dropped), strict=True
    ):
        assert drawn.equal(whole[some])
    later = trainer.draws(latents, ids, 4, config=config)
    assert not any(one.equal(other) for one, other in zip(later, (noise, added, timesteps, is_dropped), strict=True))
    plain, _, _, _ = trainer.draws(latents, ids, 3, config=replace(config, noise_offset=0.0))
    offset = noise - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)
    more = (added - noise) / 0.25
    for each, deviation in ((plain, 1.0), (offset[:, :, 0, 0] / 0.5, 1.0), (more, 1.0)):
        assert abs(each.mean()) < 5 / each.numel() ** 0.5 and abs(each.std() - deviation) < 5 / (2 * each.numel()) ** 0.5
    kinds = [
        plain[:, 0, 0, 0],
        plain[:, 1, 1, 1],
        offset[:, 0, 0, 0],
        offset[:, 1, 0, 0],
        more[:, 0, 0, 0],
        timesteps,
        is_dropped,
    ]
    correlations = torch.corrcoef(torch.stack([each.double() for each in kinds])) - torch.eye(len(kinds))
    assert abs(correlations).max() < 5 / 2000**0.5
    assert abs(is_dropped.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("bias", "first", "last"), [("none", 0, 1000), ("earlier", 0, 250), ("later", 750, 1000), ("range", 100, 300)]
)
def test_timesteps_are_drawn_as_often_as_asked_for(bias, first, last):
    config = config_of("1", timestep_bias=bias, bias_multiplier=3.0, bias_begin=100, bias_end=300)
    _, _, timesteps, _ = trainer.draws(torch.zeros(4000, 1, 1, 1), torch.arange(4000), 0, config=config)
    assert not timesteps.is_floating_point() and timesteps.min() >= 0 and timesteps.max() <= 999
    share = ((timesteps >= first) & (timesteps < last)).double().mean()
    expected = 3 * (last - first) / (1000 + 2 * (last - first)) if bias != "none" else 1.0
    assert abs(share - expected) <= 5 * (expected * (1 - expected) / 4000) ** 0.5


def test_offset_noise_is_in_the_target_and_perturbation_is_not():
    config = config_of("1", noise_offset=0.5, input_perturbation=0.25, snr_gamma=None, text_dropout=0.0)
    batch = batch_of(config)
    latents = draws(5, 2, 4, 4)
    noise, added, timesteps, _ = trainer.draws(latents, batch[3], 7, config=config)
    seen = []

    def model(noised, *others):
        seen.append(noised)
        return noise

    losses = trainer.example_losses(model, latents, None, torch.zeros(5, 4, 6), None, *batch[2:], step=7, config=config)
    assert (losses == 0).all()
    expected = of_diffusers(config).add_noise(latents, added, timesteps)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=8 * EPS)


def test_images_are_encoded_anew_in_each_step_and_scaled():
    config = config_of("1")
    frozen, (images, _, _, ids) = frozen_of(config), batch_of(config)
    drawn = [trainer.encode_images(frozen, images, ids, step, config=config) for step in (7, 7, 8)]
    assert drawn[0].equal(drawn[1]) and not torch.isclose(drawn[0], drawn[2]).any()
    mode = vae.encode(states.part(frozen, "vae"), images, config=VAE)[0] * VAE.scaling_factor
    assert not torch.isclose(drawn[0], mode).any()
    latents_alone = replace(config, vae=None)
    assert trainer.encode_images({}, mode, ids, 7, config=latents_alone) is mode


@pytest.mark.parametrize("kind", ["1", "xl"])
def test_texts_that_were_encoded_before_give_the_same_bits(kind):
    config = config_of(kind, accumulation_steps=2)
    state, frozen, (images, input_ids, *others) = state_of(config), frozen_of(config), batch_of(config)
    expected, metrics = trainer.train_step(state, frozen, images, input_ids, *others, config=config)
    of_vae = {name: each for name, each in frozen.items() if name.startswith("vae.")}
    texts = trainer.encode_texts(frozen, input_ids, config=config)
    actual, other = trainer.train_step_on_embeddings(state, of_vae, images, *texts, *others, config=config)
    assert same_bits(actual, expected) and same_bits(vars(other), vars(metrics))
    # of no microbatch's captions or images, and whatever the encoders are called
    without = replace(config, text_encoders=(), vae=None)
    latents = trainer.encode_images(frozen, images, others[1], 7, config=config)
    actual, _ = trainer.train_step_on_embeddings(state, {}, latents, *texts, *others, config=without)
    assert same_bits(actual, expected)


def test_texts_are_those_of_the_encoders_side_by_side_and_the_last_one_pools():
    config = config_of("xl")
    frozen, (_, input_ids, _, _) = frozen_of(config), batch_of(config)
    hidden, pooled = trainer.encode_texts(frozen, input_ids, config=config)
    each = [
        clip_text.clip_text(states.part(frozen, name), input_ids[:, place], config=config.text_encoders[place])
        for place, name in enumerate(("text_encoder", "text_encoder_2"))
    ]
    assert hidden.equal(torch.cat([each[0][0], each[1][0]], dim=-1)) and pooled.equal(each[1][1])
    assert trainer.encode_texts(frozen_of(config_of("1")), input_ids[:, 1:], config=config_of("1"))[1] is None


@pytest.mark.parametrize("kind", ["2", "xl, text trained"])
def test_text_encoders_change_exactly_when_they_are_trained(kind):
    config = config_of(kind, weight_decay=0.0)
    state, frozen, batch = state_of(config), frozen_of(config), batch_of(config)
    new_state, metrics = trainer.train_step(state, frozen, *batch, config=config)
    unused = trainer.unused_names(config)
    changed = {name for name in trainer.state_shapes(config) if not new_state[f"model.{name}"].equal(state[f"model.{name}"])}
    assert set(trainer.state_shapes(config)) - changed == set(unused)
    assert bool(unused) == (kind != "2") and all(name.startswith("text_encoder.") for name in unused)

    stays = replace(config, train_text_encoder=False)
    frozen_state = {name: each for name, each in state.items() if "text_encoder" not in name}
    all_frozen = frozen | {name: each for name, each in training.part_of_state(state, "model").items() if "text_encoder" in name}
    other_state, other = trainer.train_step(frozen_state, all_frozen, *batch, config=stays)
    assert set(other_state) == set(frozen_state)
    torch.testing.assert_close(other.loss, metrics.loss, rtol=16 * EPS, atol=0)
    assert other.gradient_norm < metrics.gradient_norm  # clipped jointly: the encoders' gradients count


def test_a_dropped_text_is_not_seen():
    config = config_of("xl", text_dropout=1.0)
    state, frozen, (images, input_ids, *others) = state_of(config), frozen_of(config), batch_of(config)
    results = [
        trainer.train_step(state, frozen, images, ids, *others, config=config)[0] for ids in (input_ids, input_ids.flip(0))
    ]
    assert same_bits(*results)
    changed = [others[0] + 1, others[1]]
    assert not same_bits(trainer.train_step(state, frozen, images, input_ids, *changed, config=config)[0], results[0])


@EACH
def test_order_and_microbatches_do_not_matter(kind):
    config = config_of(kind)
    state, frozen, batch = state_of(config), frozen_of(config), batch_of(config)
    expected, metrics = trainer.train_step(state, frozen, *batch, config=config)
    order = torch.tensor([3, 0, 4, 1, 2])
    for steps in (2, 3, 9):
        accumulated = replace(config, accumulation_steps=steps)
        actual, other = trainer.train_step(state, frozen, *(each[order] for each in batch), config=accumulated)
        assert_same_to_rounding(vars(other), vars(metrics), units=1024)
        assert_same_to_rounding(actual, expected, units=2**20)  # AdamW divides by gradients that may be small


@EACH
def test_a_run_is_repeated_and_resumed_bit_for_bit(kind, tmp_path):
    config = config_of(kind, accumulation_steps=2, vae=VAE)
    state, frozen = state_of(config), frozen_of(config)
    batches = [batch_of(config, size) for size in (5, 2, 4, 3)]

    def run(state, batches):
        for each in batches:
            state, _ = trainer.train_step(state, frozen, *each, config=config)
        return state

    copies = {name: each.clone() for name, each in (state | frozen).items()}
    through = run(state, batches)
    assert same_bits(state | frozen, copies) and same_bits(run(state, batches), through)
    training.save_state(run(state, batches[:2]), tmp_path / "run.safetensors")
    assert same_bits(run(training.load_state(tmp_path / "run.safetensors"), batches[2:]), through)


def test_the_scale_of_the_loss_changes_no_bit_and_bfloat16_little():
    config = config_of("2", accumulation_steps=2)
    narrow = [
        {name: each.float() if each.is_floating_point() else each for name, each in tensors.items()}
        for tensors in (state_of(config), frozen_of(config))
    ]
    batch = [each.float() if each.is_floating_point() else each for each in batch_of(config)]
    results = [trainer.train_step(*narrow, *batch, config=replace(config, loss_scale=scale)) for scale in (1.0, 2.0**10)]
    assert same_bits(results[0][0], results[1][0]) and results[0][1].loss.dtype == torch.float32
    _, exact = results[0]
    new_state, rounded = trainer.train_step(*narrow, *batch, config=replace(config, compute_dtype="bfloat16"))
    assert 0 < abs(rounded.loss / exact.loss - 1) < 0.05 and 0 < abs(rounded.gradient_norm / exact.gradient_norm - 1) < 0.1
    assert all(each.dtype == torch.float32 for name, each in new_state.items() if name != "step")


def test_the_loss_falls_from_the_start_of_a_run():
    config = config_of("2", text_dropout=0.1, learning_rate=3e-3, schedule=SCHEDULES["noise"], noise_offset=0.0, snr_gamma=None)
    state = trainer.initial_state(config)
    frozen = {name: each.float() for name, each in frozen_of(config).items()}
    batch = [each.float() if each.is_floating_point() else each for each in batch_of(config)]
    losses = []
    for _ in range(40):
        state, metrics = trainer.train_step(state, frozen, *batch, config=config)
        losses.append(metrics.loss)
    assert abs(losses[0] - 1) < 0.5  # the UNet begins with 0, and noise has a variance of 1
    assert torch.stack(losses[-10:]).mean() < 0.8 * torch.stack(losses[:3]).mean()


def test_both_begin_with_the_same_parameters(monkeypatch):
    config = config_of("xl, text trained", ema=None)
    state = trainer.initial_state(config)
    assert not state["model.unet.conv_out.weight"].any() and state["model.text_encoder_2.text_projection.weight"].all()
    assert {f"exp_avg.{name}" for name in trainer.unused_names(config)}.isdisjoint(state)

    name, shape, seed = "text_model.embeddings.token_embedding.weight", (12, 6), config.seed
    drawn = [module.initial_parameter(name, shape, seed=seed, place=3) for module in (image_models, jax_image_models)]
    assert np.array_equal(*drawn) and 0.01 < drawn[0].std() < 0.03
    # test_train_image_models.py has all draws; JAX compiles one for each shape
    of_torch = image_models.initial_parameter
    monkeypatch.setattr(jax_image_models, "initial_parameter", lambda *of, **key: jnp.asarray(of_torch(*of, **key).numpy()))
    jax_state = jax_trainer.initial_state(config)
    assert same_bits(jax_state, state) and list(jax_state) == list(state)


@pytest.mark.parametrize("kind", ["2", "xl"])
def test_torch_and_jax_make_the_same_steps(kind):
    config = config_of(kind)
    state, frozen, batch = state_of(config), frozen_of(config), batch_of(config)
    with jax.enable_x64(True):
        jax_state, jax_frozen, jax_batch = to_jax(state), to_jax(frozen), to_jax(batch)
        first = jax_trainer.train_step(jax_state, jax_frozen, *jax_batch, config=config)
        for _ in range(2):
            state, metrics = trainer.train_step(state, frozen, *batch, config=config)
            jax_state, jax_metrics = jax_trainer.train_step(jax_state, jax_frozen, *jax_batch, config=config)
            assert_same_to_rounding(vars(jax_metrics), vars(metrics), units=2**10)
        assert_same_to_rounding(jax_state, state, units=2**20)
        if kind == "xl":
            texts = jax_trainer.encode_texts(jax_frozen, jax_batch[1], config=config)
            of_vae = {name: each for name, each in jax_frozen.items() if name.startswith("vae.")}
            arguments = to_jax(state_of(config)), of_vae, jax_batch[0], *texts, *jax_batch[2:]
            again = jax_trainer.train_step_on_embeddings(*arguments, config=config)
            assert same_bits(again[0], first[0]) and same_bits(vars(again[1]), vars(first[1]))


def test_published_schedules_are_what_a_run_takes():
    for name in ("stable-diffusion-1", "stable-diffusion-2.1", "stable-diffusion-xl", "zero-snr"):
        schedule = DIFFUSION_SCHEDULE_PRESETS[name]
        rates = partial(trainer.rates, torch.arange(1000))
        alphas, sigmas, _ = rates(config=config_of("1", schedule=schedule, snr_gamma=None))
        assert (alphas.diff() < 0).all() and (sigmas.diff() > 0).all() and (alphas[-1] == 0) == schedule.rescale_betas_zero_snr
