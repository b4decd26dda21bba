"""diffusers' AutoencoderKL on trial; imported only where diffusers is installed."""

import functools
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import VAEConfig


class Half(torch.nn.Module):
    """The modules of one half, by the names that they have in the whole."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        levels = len(config.block_out_channels)
        with torch.device("meta"):
            self.whole = AutoencoderKL(
                in_channels=config.in_channels, out_channels=config.out_channels, latent_channels=config.latent_channels,
                block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
                norm_num_groups=config.norm_num_groups, mid_block_add_attention=config.mid_block_add_attention,
                use_quant_conv=config.use_quant_conv, use_post_quant_conv=config.use_post_quant_conv,
                down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            ).eval()  # fmt: skip

    def forward(self, inputs: torch.Tensor, encodes: bool) -> Any:
        """`encode` or `decode`, without what they do beside (slices, tiles)."""
        if encodes:
            posterior: DiagonalGaussianDistribution = self.whole.encode(inputs).latent_dist
            return posterior.mean, posterior.logvar
        return self.whole.decode(inputs).sample


@functools.cache
def model(config: VAEConfig) -> Half:
    """Of any parameters."""
    return Half(config)


def called(state: dict[str, torch.Tensor], inputs: torch.Tensor, encodes: bool, config: VAEConfig) -> Any:
    """The model's result with these parameters, the other half's being none."""
    parameters = {f"whole.{name}": each for name, each in state.items()}
    return functional_call(model(config), parameters, (inputs, encodes))


@peer("vae.encode", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersVaeEncode:
    """AutoencoderKL.encode, mean and log variance of its latent_dist."""

    def __call__(self, state, images, *, config):
        return called(state, images, True, config)


@peer("vae.decode", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersVaeDecode:
    """AutoencoderKL.decode."""

    def __call__(self, state, latents, *, config):
        return called(state, latents, False, config)
