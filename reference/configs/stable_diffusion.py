"""A training run of Stable Diffusion."""

from dataclasses import dataclass
from typing import get_args

from gaugeblock.reference.configs.clip_text import CLIPTextConfig
from gaugeblock.reference.configs.options import TimestepBias
from gaugeblock.reference.configs.schedules import DIFFUSION_SCHEDULE_PRESETS, DiffusionScheduleConfig
from gaugeblock.reference.configs.training import TrainingConfig, require_options
from gaugeblock.reference.configs.unet import UNetConfig
from gaugeblock.reference.configs.vae import VAEConfig


@dataclass(frozen=True)
class StableDiffusionConfig(TrainingConfig):
    """One training run of Stable Diffusion 1, 2 or XL; with the attributes of `TrainingConfig`.

    Attributes:
        unet: What is trained. With added embeddings it is one of XL's, which is told a pooled text and numbers as well.
        text_encoders: What encodes captions, whose hidden states are put side by side; the last one's pooled result is told to a
            UNet with added embeddings. () for a run whose batches have texts that are encoded already.
        vae: What encodes images; None for a run whose batches have latents.
        schedule: Of the noise; and its prediction_type says what the UNet predicts.
        train_text_encoder: Whether the text encoders are trained too.
        text_dropout: Probability that an example is told 0 in place of its text, for classifier-free guidance.
        snr_gamma: What the signal-to-noise ratio is clipped to that errors are weighted by; None for no weights.
        timestep_bias: Which timesteps are drawn more often than the others.
        bias_multiplier: How much more often.
        bias_portion: Which portion of them, of "earlier" and "later".
        bias_begin, bias_end: Which ones, of "range".
        noise_offset: How much of a number that is drawn for each channel is added to the noise.
        input_perturbation: How much of another noise is added to that in the noised example, but not to the target's.

    Raises:
        ValueError: A value is out of its range, or sizes do not fit together.

    Source: Rombach et al. 2022 (arXiv:2112.10752), section 3.3; Podell et al. 2023 (arXiv:2307.01952), section 2; weights:
    Hang et al. 2023 (arXiv:2303.09556); input perturbation: Ning et al. 2023 (arXiv:2301.11706); diffusers'
    train_text_to_image.py and train_text_to_image_sdxl.py.
    """

    unet: UNetConfig
    text_encoders: tuple[CLIPTextConfig, ...] = ()
    vae: VAEConfig | None = None
    schedule: DiffusionScheduleConfig = DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-1"]
    train_text_encoder: bool = False
    text_dropout: float = 0.0
    snr_gamma: float | None = None
    timestep_bias: TimestepBias = "none"
    bias_multiplier: float = 1.0
    bias_portion: float = 0.25
    bias_begin: int = 0
    bias_end: int = 1000
    noise_offset: float = 0.0
    input_perturbation: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_dropout", "bias_portion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("bias_multiplier", "snr_gamma"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("noise_offset", "input_perturbation"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        require_options(self, timestep_bias=get_args(TimestepBias))
        last = self.schedule.num_train_timesteps
        if self.timestep_bias == "range" and not 0 <= self.bias_begin < self.bias_end <= last:
            raise ValueError(f"bias_begin and bias_end must rise within 0..{last}, got {self.bias_begin} and {self.bias_end}")
        if self.snr_gamma is not None and self.schedule.rescale_betas_zero_snr and self.schedule.prediction_type == "epsilon":
            # data / noise is 0 at the last timestep, and min(snr, gamma) / snr no number
            raise ValueError("snr_gamma must be None where epsilon is predicted at a signal-to-noise ratio of 0")
        self._check_sizes()

    def _check_sizes(self) -> None:
        unet, encoders = self.unet, self.text_encoders
        if unet.in_channels != unet.out_channels:
            raise ValueError(f"unet.out_channels must be in_channels={unet.in_channels}, got {unet.out_channels}")
        if self.vae is not None and self.vae.latent_channels != unet.in_channels:
            raise ValueError(f"vae.latent_channels must be unet.in_channels={unet.in_channels}, got {self.vae.latent_channels}")
        if not isinstance(encoders, tuple):  # what is hashed can be a static argument
            raise ValueError(f"text_encoders must be a tuple, got {encoders!r}")
        if not encoders:
            if self.train_text_encoder:
                raise ValueError("train_text_encoder must be False where texts are encoded already: text_encoders is ()")
            return
        widths = [each.hidden_size for each in encoders]
        if sum(widths) != unet.cross_attention_dim:
            raise ValueError(
                f"text_encoders must have hidden sizes that add up to unet.cross_attention_dim={unet.cross_attention_dim}, "
                f"got {widths}"
            )
        if self.is_told_sizes and self.num_time_ids * unet.addition_time_embed_dim != self._of_time_ids:
            raise ValueError(
                f"unet.projection_class_embeddings_input_dim must be the {encoders[-1].pooled_size} of the pooled text and a "
                f"multiple of {unet.addition_time_embed_dim}, got {unet.projection_class_embeddings_input_dim}"
            )

    @property
    def is_told_sizes(self) -> bool:
        """Whether the UNet is told a pooled text, and numbers such as an image's size and crop, as XL is."""
        return self.unet.addition_time_embed_dim > 0

    @property
    def num_time_ids(self) -> int:
        """How many numbers the UNet is told, where there are text encoders."""
        return max(self._of_time_ids, 0) // self.unet.addition_time_embed_dim if self.is_told_sizes else 0

    @property
    def _of_time_ids(self) -> int:
        return self.unet.projection_class_embeddings_input_dim - self.text_encoders[-1].pooled_size

    @property
    def text_encoder_names(self) -> tuple[str, ...]:
        """What the encoders' parameters are under: text_encoder, text_encoder_2."""
        return tuple("text_encoder" + (f"_{place}" if place > 1 else "") for place in range(1, len(self.text_encoders) + 1))
