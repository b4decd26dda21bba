"""Small models of Stable Diffusion in a training run: configs, states and batches."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from trained_models import draws

from gaugeblock.conformance.contracts import clip_text as of_clip
from gaugeblock.conformance.contracts import unet as of_unet
from gaugeblock.reference.configs import DIFFUSION_SCHEDULE_PRESETS, EMAConfig, StableDiffusionConfig, VAEConfig
from gaugeblock.reference.torch import train_stable_diffusion as trainer

EPS = np.finfo(np.float64).eps
VAE = VAEConfig(
    in_channels=1, latent_channels=2, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2,
    mid_block_add_attention=False, scaling_factor=0.5,
)  # fmt: skip
CLIP = of_clip.tiny_model(6, 2, eos_token_id=5)
FIRST = of_clip.tiny_model(6, 2, returned_layer=-2, normalize_returned=False)
SECOND = of_clip.tiny_model(8, 2, eos_token_id=5, projection_dim=5, returned_layer=-2, normalize_returned=False)
UNET = of_unet.tiny_model(of_unet.MIDDLE_ALONE, in_channels=2, out_channels=2)
XL = replace(
    UNET, cross_attention_dim=14, addition_time_embed_dim=4, projection_class_embeddings_input_dim=5 + 6 * 4,
    use_linear_projection=True,
)  # fmt: skip
SCHEDULES = {
    name: replace(DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-1"], **changes)
    for name, changes in {
        "noise": {},
        "velocity": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        "data": {"prediction_type": "sample"},
    }.items()
}
KINDS: dict[str, dict[str, Any]] = {
    "1": {"unet": UNET, "text_encoders": (CLIP,), "snr_gamma": 5.0, "timestep_bias": "earlier", "bias_multiplier": 3.0},
    "2": {
        "unet": UNET, "text_encoders": (CLIP,), "schedule": SCHEDULES["velocity"], "snr_gamma": 0.5, "noise_offset": 0.1,
        "train_text_encoder": True,
    },
    "xl": {"unet": XL, "text_encoders": (FIRST, SECOND), "input_perturbation": 0.1, "ema": EMAConfig(warmup=True)},
    "xl, text trained": {
        "unet": XL, "text_encoders": (FIRST, SECOND), "train_text_encoder": True, "schedule": SCHEDULES["data"], "snr_gamma": 2.0,
        "timestep_bias": "range", "bias_begin": 100, "bias_end": 300,
    },
}  # fmt: skip


def config_of(kind: str, **changes: Any) -> StableDiffusionConfig:
    ordinary = {"vae": VAE, "learning_rate": 1e-2, "weight_decay": 0.1, "text_dropout": 0.3}
    return StableDiffusionConfig(**ordinary | KINDS[kind] | changes)


def parameters_of(shapes, seed: int) -> dict[str, torch.Tensor]:
    """In float64, none of them 0."""
    return {
        name: draws(*shape, seed=seed + place) * (0.3 if len(shape) == 1 else torch.Size(shape[1:]).numel() ** -0.5)
        for place, (name, shape) in enumerate(shapes.items())
    }


def state_of(config: StableDiffusionConfig) -> dict[str, torch.Tensor]:
    """In float64, at step 7, no gradient of which is 0 by design."""
    state = trainer.state_of(parameters_of(trainer.state_shapes(config), 0), config=config)
    return state | {"step": torch.tensor(7)}


def frozen_of(config: StableDiffusionConfig) -> dict[str, torch.Tensor]:
    return parameters_of(trainer.frozen_shapes(config), 1000)


def batch_of(config: StableDiffusionConfig, size: int = 5) -> tuple[torch.Tensor, ...]:
    """Images, ids of tokens, each caption ended by the token 5, numbers, and ids of examples, two of them the same."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(6, 12, (size, len(config.text_encoders), 4), generator=generator)
    input_ids[:, :, 2] = 5
    example_ids = torch.arange(7, 7 + size)
    example_ids[-1] = example_ids[0]
    time_ids = torch.randint(0, 1025, (size, config.num_time_ids), generator=generator).double()
    return draws(size, 1, 4, 4), input_ids, time_ids, example_ids


def assert_same_to_rounding(actual, expected, units: int) -> None:
    """Differ by no more than so many roundings of the largest number of each tensor, or of 1e-6 where that is less.

    What is 0 but for rounding, such as the gradient of a bias of keys, has no large numbers.
    """
    assert set(actual) == set(expected)
    for name, each in expected.items():
        largest = max(np.abs(np.asarray(each)).max(initial=0), 1e-6)
        assert np.abs(np.asarray(actual[name]) - np.asarray(each)).max(initial=0) <= units * EPS * largest, name
