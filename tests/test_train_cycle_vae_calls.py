"""Bad calls of the step of text-latent diffusion with cycles, and bad configs of its runs."""

from dataclasses import replace

import pytest
from cycle_models import MODEL, batch_of, config_of, state_of

from gaugeblock.reference.configs import CycleVAEConfig
from gaugeblock.reference.torch import train_cycle_vae as trainer

CHANGES = {
    "input_ids": [
        (lambda each: each + 12, r"input_ids must be in 0\.\.11"),
        (lambda each: each.double(), "input_ids must be int32 or int64"),
        (lambda each: each[:3], r"attention_mask must be \[batch_size=3, num_tokens=4\]"),
        (lambda each: each[:, :0], r"input_ids must have 1\.\.7 tokens, got 0"),
    ],
    "latents": [
        (lambda each: each.bfloat16(), "latents must be float32 or float64, got bfloat16"),
        (lambda each: each[:, None], r"latents must be \[batch_size=5, latent_dim=5\], got \(5, 1, 5\)"),
        (lambda each: each.float(), r"state\[.*must be float32, got float64"),
    ],
    "attention_mask": [
        (lambda each: each.float(), "attention_mask must be bool"),
        (lambda each: each[:, 1:], r"attention_mask must be \[batch_size=5, num_tokens=4\]"),
    ],
    "example_ids": [(lambda each: each[1:], r"example_ids must be \[batch_size=5\]")],
    "state": [(lambda each: each | {"model.more": each["step"]}, "state must have no other entries, got model.more")],
}
CHANGES_OF_NAMES = [(name, *each) for name, changes in CHANGES.items() for each in changes]


@pytest.mark.parametrize(("name", "change", "message"), CHANGES_OF_NAMES, ids=[each[2][:40] for each in CHANGES_OF_NAMES])
def test_bad_calls_are_told(name, change, message):
    config, names = config_of("as it is published"), ["input_ids", "latents", "attention_mask", "example_ids"]
    call = {"state": state_of(config), **dict(zip(names, batch_of(), strict=True))}
    call[name] = change(call[name])
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.train_step(*call.values(), config=config)
    with pytest.raises(ValueError, match="latents must hold at least one example"):
        trainer.train_step(state_of(config), *(each[:0] for each in batch_of()), config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 12}, r"mask_token_id must be in 0\.\.11, got 12"),
        ({"mode": "unconditional"}, "mode must be 'cycle' or 't2l' or 'l2t'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type must be 'epsilon' or 'sample' or 'v_prediction'"),
        ({"latent_t_mode": "ones"}, "latent_t_mode must be 'random' or 'full'"),
        ({"latent_t_min": 0.9}, r"latent_t_min and latent_t_max must rise within \[0, 1\]"),
        ({"cycle_text_weight": -0.1}, "cycle_text_weight must not be negative"),
        ({"cycle_latent_ramp_steps": -1}, "cycle_latent_ramp_steps must not be negative"),
        ({"cycle_every": 0}, "cycle_every must be positive, or None"),
        ({"cycle_latent_sampling": "gumbel"}, "cycle_latent_sampling must be 'argmax' or 'categorical'"),
        ({"cycle_latent_temperature": 0.0}, "cycle_latent_temperature must be positive"),
        ({"first_warmup_step": 2}, "first_warmup_step must be 0 or 1"),
        ({"final_learning_rate_ratio": 1.5}, r"final_learning_rate_ratio must be in \[0, 1\]"),
    ],
)
def test_a_bad_config_is_rejected_when_it_is_made(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config_of("as it is published"), **changes)


def test_defaults_are_the_recommended_ones():
    config = CycleVAEConfig(MODEL, 11)
    assert (config.cycle_text_weight, config.cycle_latent_weight, config.latent_loss_weight) == (0.1, 0.1, 0.1)
    assert config.cycle_text_ramp_steps == config.cycle_latent_ramp_steps == 10_000
    assert config.cycle_stop_grad_latent and config.latent_t_mode == "random" and config.cycle_latent_sampling == "argmax"
