"""Bad calls of the Stable Diffusion training step, and bad configs of its runs."""

from dataclasses import replace

import pytest
import torch
from stable_models import KINDS, UNET, VAE, XL, batch_of, config_of, frozen_of, state_of
from trained_models import draws

from gaugeblock.reference.configs import StableDiffusionConfig
from gaugeblock.reference.jax import train_stable_diffusion as jax_trainer
from gaugeblock.reference.torch import train_stable_diffusion as trainer


def test_embeddings_are_refused_where_text_encoders_are_trained():
    config = config_of("2")
    state, (images, _, time_ids, ids) = state_of(config), batch_of(config)
    texts = torch.zeros(5, 4, 6, dtype=torch.float64), None
    for module in (trainer, jax_trainer):
        with pytest.raises(ValueError, match=r"train_text_encoder must be False on texts that are encoded already"):
            module.train_step_on_embeddings(state, {}, images, *texts, time_ids, ids, config=config)
    with pytest.raises(
        ValueError, match=r"train_text_encoder must be False where texts are encoded already: text_encoders is \(\)"
    ):
        StableDiffusionConfig(UNET, train_text_encoder=True)
    with pytest.raises(ValueError, match=r"config\.text_encoders must encode the captions, got \(\)"):
        trainer.train_step(state, {}, images, ids, time_ids, ids, config=StableDiffusionConfig(UNET))


CHANGES = {
    "images": [
        (lambda each: each.bfloat16(), "images must be float32 or float64, got bfloat16"),
        (lambda each: each[:, :, :1], r"images must have a height and a width of at least 2"),
        (lambda each: each[:0], "images must hold at least one example"),
        (lambda each: torch.cat([each, each], dim=1), r"images must be \[batch_size, in_channels=1, height, width\]"),
    ],
    "input_ids": [
        (lambda each: each[:, :1], r"input_ids must be \[batch_size=5, num_encoders=2, num_tokens\]"),
        (lambda each: each + 12, r"input_ids must be in 0\.\.11"),
        (lambda each: each.double(), "input_ids must be int32 or int64"),
        (lambda each: each * 0 + 6, "input_ids must have eos_token_id=5 in every row"),
        (lambda each: each.repeat(1, 1, 5), r"input_ids must have 1\.\.17 tokens, got 20"),
    ],
    "time_ids": [
        (lambda each: each[:, 1:], r"time_ids must be \[batch_size=5, num_time_ids=6\]"),
        (lambda each: each.float(), "time_ids must be float64, got float32"),
    ],
    "example_ids": [(lambda each: each[1:], r"example_ids must be \[batch_size=5\]")],
    "frozen": [
        (
            lambda each: each | {"vae.decoder": each["vae.encoder.conv_in.bias"]},
            "frozen must have no other entries, got vae.decoder",
        ),
        (lambda each: {name: array.float() for name, array in each.items()}, "must be float64, got float32"),
        (lambda each: {**each, "vae.encoder.conv_in.bias": each["vae.encoder.conv_in.bias"][1:]}, "frozen must have vae.encoder"),
    ],
    "state": [
        (lambda each: each | {"model.text_encoder": each["step"]}, "state must have no other entries, got model.text_encoder")
    ],
}
CHANGES_OF_NAMES = [(name, *each) for name, changes in CHANGES.items() for each in changes]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES_OF_NAMES, ids=[each[2][:40] for each in CHANGES_OF_NAMES])
def test_bad_calls_are_told(name, change, message):
    config = config_of("xl")
    names = ["images", "input_ids", "time_ids", "example_ids"]
    call = {"state": state_of(config), "frozen": frozen_of(config), **dict(zip(names, batch_of(config), strict=True))}
    call[name] = change(call[name])
    if name == "images" and len(call[name]) == 0:
        call |= {each: call[each][:0] for each in names}
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.train_step(*call.values(), config=config)


EMBEDDINGS = [
    ("xl", 3, lambda each: each[:, :, 1:], r"encoder_hidden_states must be \[batch_size=5, num_tokens, width=14\]"),
    ("xl", 4, lambda each: each[:, 1:], r"text_embeds must be \[batch_size=5, pooled_size=5\]"),
    ("xl", 4, lambda each: None, "text_embeds must be an array, got NoneType"),
    ("1", 4, lambda each: torch.zeros(5, 5), "text_embeds must be None for a UNet without added embeddings"),
    ("1", 5, lambda each: torch.zeros(5, 6).double(), r"time_ids must be \[batch_size=5, num_time_ids=0\]"),
]


@pytest.mark.parametrize(("kind", "place", "change", "message"), EMBEDDINGS)
def test_bad_embeddings_are_told(kind, place, change, message):
    config = config_of(kind, vae=None)
    state, frozen, (_, input_ids, *others) = state_of(config), frozen_of(config), batch_of(config)
    call = [state, {}, draws(5, 2, 4, 4), *trainer.encode_texts(frozen, input_ids, config=config), *others]
    call[place] = change(call[place])
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.train_step_on_embeddings(*call, config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_dropout": 1.5}, "text_dropout must be in"),
        ({"bias_portion": -0.1}, "bias_portion must be in"),
        ({"bias_multiplier": 0.0}, "bias_multiplier must be positive"),
        ({"snr_gamma": 0.0}, "snr_gamma must be positive"),
        ({"noise_offset": -0.1}, "noise_offset must not be negative"),
        ({"input_perturbation": -0.1}, "input_perturbation must not be negative"),
        ({"timestep_bias": "late"}, "timestep_bias must be"),
        ({"timestep_bias": "range", "bias_end": 1001}, "bias_begin and bias_end must rise"),
        ({"vae": replace(VAE, latent_channels=3)}, "vae.latent_channels must be unet.in_channels=2"),
        ({"unet": replace(UNET, out_channels=4)}, "unet.out_channels must be in_channels=2"),
        ({"text_encoders": []}, "text_encoders must be a tuple"),
        (
            {"text_encoders": KINDS["1"]["text_encoders"] * 2},
            r"hidden sizes that add up to unet\.cross_attention_dim=6, got \[6, 6\]",
        ),
        ({"unet": replace(XL, cross_attention_dim=6)}, "unet.projection_class_embeddings_input_dim must be the 6 of the pooled"),
    ],
)
def test_a_bad_config_is_rejected_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("1", **changes)
