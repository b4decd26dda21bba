"""AutoencoderKL, the VAE of latent diffusion models, and its published sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType


@dataclass(frozen=True)
class VAEConfig:
    """A convolutional autoencoder whose latents are Gaussian; names as in diffusers' AutoencoderKL.

    As they stand, these are the sizes of Stable Diffusion 1 and 2.

    Attributes:
        in_channels: Channels of the images that are encoded.
        out_channels: Channels of the images that are decoded.
        latent_channels: Channels of the latents; the encoder gives as many means and as many log variances.
        block_out_channels: Channels at each resolution, the highest first; each a multiple of `norm_num_groups`. From one to the
            next height and width are halved.
        layers_per_block: Residual blocks of the encoder at each resolution; the decoder has one more.
        norm_num_groups: Groups of every GroupNorm.
        mid_block_add_attention: Whether there is attention at the lowest resolution.
        use_quant_conv: Whether a 1 x 1 convolution follows the encoder.
        use_post_quant_conv: Whether a 1 x 1 convolution precedes the decoder.
        scaling_factor: What latents are multiplied by for a diffusion model, once they are shifted.
        shift_factor: What is subtracted from latents for a diffusion model (diffusers: None for 0).

    Raises:
        TypeError: block_out_channels is no tuple.
        ValueError: Sizes are not positive or do not fit together, or a factor is not finite, or the scale is 0.

    Source: Rombach et al. 2021 (arXiv:2112.10752), section 3.1 and appendix G; the configurations of the checkpoints' `vae`.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        channels = self.block_out_channels
        if not isinstance(channels, tuple):  # what is hashed can be a static argument
            raise TypeError(f"block_out_channels must be a tuple, got {channels!r}")
        if not channels or any(each < 1 or each % self.norm_num_groups for each in channels):
            raise ValueError(f"block_out_channels must be multiples of norm_num_groups={self.norm_num_groups}, got {channels}")
        for name in ("scaling_factor", "shift_factor"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.scaling_factor == 0:
            raise ValueError(f"scaling_factor must not be 0, got {self.scaling_factor}")

    @property
    def downsampling(self) -> int:
        """Height and width of an image, in units of those of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)


_STABLE_DIFFUSION = VAEConfig()
_SIXTEEN_CHANNELS = replace(_STABLE_DIFFUSION, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
VAE_PRESETS: Mapping[str, VAEConfig] = MappingProxyType(
    {
        "stable-diffusion-1": _STABLE_DIFFUSION,
        "stable-diffusion-2": _STABLE_DIFFUSION,
        "stable-diffusion-xl": replace(_STABLE_DIFFUSION, scaling_factor=0.13025),
        "stable-diffusion-3": replace(_SIXTEEN_CHANNELS, scaling_factor=1.5305, shift_factor=0.0609),
        "flux": replace(_SIXTEEN_CHANNELS, scaling_factor=0.3611, shift_factor=0.1159),
    }
)
