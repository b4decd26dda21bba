"""Small models of every kind in a training run: configs, states and batches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import torch

from gaugeblock.conformance.contracts import dit_moe as of_dit_moe
from gaugeblock.conformance.contracts import flux as of_flux
from gaugeblock.conformance.contracts import mmdit as of_mmdit
from gaugeblock.conformance.contracts import unet as of_unet
from gaugeblock.conformance.engine.registry import find_contract
from gaugeblock.reference.configs import DiTConfig, EMAConfig, ImageDiffusionConfig
from gaugeblock.reference.torch import train_image_diffusion as trainer

MODELS = {
    "dit": DiTConfig(
        input_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=False,
        frequency_embedding_size=8,
    ),
    "dit_moe": replace(of_dit_moe.configuration(find_contract("dit_moe.dit_moe").landmarks[0]), learn_sigma=False),
    "unet": of_unet.tiny_model(in_channels=3, out_channels=3),
    "flux": of_flux.configuration(find_contract("flux.flux").landmarks[0]),
    "mmdit": of_mmdit.configuration(find_contract("mmdit.mmdit").landmarks[0]),
}  # fmt: skip
OPTIONS = {
    "usual": {},
    "noise": {"prediction_type": "epsilon", "min_snr_gamma": 5.0, "timestep_sampling": "mode", "ema": EMAConfig()},
    "data": {"prediction_type": "sample", "min_snr_gamma": 2.0, "timestep_sampling": "later", "bias_multiplier": 3.0},
}


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config_of(name: str, **changes) -> ImageDiffusionConfig:
    return ImageDiffusionConfig(MODELS[name], learning_rate=1e-2, label_dropout=0.4, weight_decay=0.1, **changes)


def state_of(config: ImageDiffusionConfig) -> dict[str, torch.Tensor]:
    """In float64, no gradient of which is 0 by design."""
    state = trainer.initial_state(config)
    return {
        name: each if name == "step" else each.double() + 0.1 * draws(*each.shape, seed=place).abs()
        for place, (name, each) in enumerate(state.items())
    }


def batch_of(name: str, size: int = 5) -> tuple:
    """The step, and its arrays."""
    config, ids = MODELS[name], torch.arange(7, 7 + size)
    images = draws(size, 1 if name == "flux" else 3, 4, 4)
    if name in ("dit", "dit_moe"):
        return "train_step", (images, torch.arange(size) % 3, ids)
    width = config.cross_attention_dim if name == "unet" else config.joint_attention_dim
    pooled = None if name == "unet" else draws(size, config.pooled_projection_dim, seed=2)
    return "train_step_on_texts", (images, draws(size, 4, width, seed=1), pooled, ids)


def to_jax(arrays):
    return jax.tree.map(lambda each: jnp.asarray(each.numpy()), arrays)


def same_bits(actual, expected) -> bool:
    return set(actual) == set(expected) and all(np.array_equal(actual[name], each) for name, each in expected.items())
