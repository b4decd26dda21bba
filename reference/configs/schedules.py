"""Noise schedules and how they are sampled: variance preserving diffusion, rectified flow, EDM; with published ones."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, get_args

from gaugeblock.reference.configs.options import (
    BetaSchedule,
    FinalSigma,
    FlowStart,
    PredictionType,
    SigmaSchedule,
    TimeShift,
    TimestepSpacing,
    VarianceType,
)


@dataclass(frozen=True)
class DiffusionScheduleConfig:
    """Variance preserving diffusion in discrete timesteps, and how it is sampled; names as in the schedulers of diffusers.

    Attributes:
        num_train_timesteps: Length of the tables.
        beta_start, beta_end: The first and the last beta; "squaredcos_cap_v2" has its own.
        beta_schedule: How betas go from one to the other.
        rescale_betas_zero_snr: Whether the tables are rescaled so that nothing of the data is left at the last timestep.
        prediction_type: What the model predicts.
        timestep_spacing: Which timesteps are visited.
        steps_offset: Added to those of "leading".
        set_alpha_to_one: Whether DDIM's last step goes to the data, and not to the noise of timestep 0.
        clip_sample: Whether predicted data are clipped (DDPM, DDIM, Heun).
        clip_sample_range: To this magnitude.
        thresholding: Whether they are clipped to a quantile of their magnitudes instead, and divided by it (DDPM, DDIM).
        dynamic_thresholding_ratio: Which quantile.
        sample_max_value: The largest value that it may have; the least is 1.
        variance_type: Of the noise that DDPM adds.
        sigma_schedule: Which sigmas Euler and Heun visit.
        sigma_min, sigma_max: Ends of the sigmas that are no interpolated ones; None for those of the timesteps.
        final_sigmas_type: What comes after the last sigma.

    Raises:
        ValueError: A value is out of its range.

    Source: Ho et al. (arXiv:2006.11239); Song et al. (arXiv:2010.02502); Lin et al. (arXiv:2305.08891); diffusers' schedulers.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    rescale_betas_zero_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    variance_type: VarianceType = "fixed_small"
    sigma_schedule: SigmaSchedule = "interpolated"
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: FinalSigma = "zero"

    def __post_init__(self) -> None:
        _require_names(
            self,
            beta_schedule=BetaSchedule,
            prediction_type=PredictionType,
            timestep_spacing=TimestepSpacing,
            variance_type=VarianceType,
            sigma_schedule=SigmaSchedule,
            final_sigmas_type=FinalSigma,
        )
        if self.prediction_type == "flow_prediction":
            raise ValueError("prediction_type must be epsilon, sample or v_prediction, got 'flow_prediction'")
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps must be at least 2, got {self.num_train_timesteps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"beta_start and beta_end must rise within (0, 1), got {self.beta_start}, {self.beta_end}")
        if not 0 <= self.steps_offset < self.num_train_timesteps:
            raise ValueError(f"steps_offset must be in 0..num_train_timesteps - 1, got {self.steps_offset}")
        _require_positive(self, "clip_sample_range")
        if not 0 < self.dynamic_thresholding_ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must be in (0, 1], got {self.dynamic_thresholding_ratio}")
        if not self.sample_max_value >= 1:
            raise ValueError(f"sample_max_value must be at least 1, got {self.sample_max_value}")
        _require_positive(self, *(name for name in ("sigma_min", "sigma_max") if getattr(self, name) is not None))


@dataclass(frozen=True)
class FlowScheduleConfig:
    """Rectified flow, and which sigmas are visited; names as in the schedulers of diffusers. Sigma 1 is noise, 0 the data.

    Attributes:
        num_train_timesteps: What a model is told at sigma 1.
        shift: sigma becomes shift * sigma / (1 + (shift - 1) * sigma), in the table and, as published, in what is visited again.
        use_dynamic_shifting: Whether what is visited is shifted by mu, which depends on the number of image tokens, instead.
        base_shift, max_shift: mu at `base_image_seq_len` and at `max_image_seq_len` tokens.
        base_image_seq_len, max_image_seq_len: Between which mu is linear, and beyond them too.
        time_shift_type: Whether the shift is exp(mu) or mu itself.
        shift_terminal: What the last sigma is stretched to; None for what it is.
        sigma_schedule: Which sigmas lie between the first and the last.
        first_sigmas: What is shifted: sigmas from one end of the training's table to the other, or 1, 1 - 1 / num_steps, ..., as
            the pipeline of Flux asks for.
        stochastic_sampling: Whether each step predicts the data and adds new noise to them.

    Raises:
        ValueError: A value is out of its range.

    Source: Esser et al. (arXiv:2403.03206), section 5.3.2; diffusers' FlowMatchEulerDiscreteScheduler.
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    time_shift_type: TimeShift = "exponential"
    shift_terminal: float | None = None
    sigma_schedule: SigmaSchedule = "interpolated"
    first_sigmas: FlowStart = "training range"
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        _require_names(self, time_shift_type=TimeShift, sigma_schedule=SigmaSchedule, first_sigmas=FlowStart)
        _require_positive(self, "num_train_timesteps", "shift", "base_image_seq_len")
        if not self.base_image_seq_len < self.max_image_seq_len:
            raise ValueError(f"max_image_seq_len must be above base_image_seq_len, got {self.max_image_seq_len}")
        if self.shift_terminal is not None and not 0 < self.shift_terminal < 1:
            raise ValueError(f"shift_terminal must be in (0, 1), got {self.shift_terminal}")


@dataclass(frozen=True)
class EDMScheduleConfig:
    """Diffusion whose noise is added, not mixed in, and a model whose inputs and outputs are scaled by sigma.

    Attributes:
        sigma_min, sigma_max: The last and the first sigma.
        sigma_data: Standard deviation of the data.
        sigma_schedule: "karras" or "exponential".
        rho: Of Karras' schedule: the larger, the more steps at small sigmas.
        prediction_type: "epsilon": the scaled output is added to the scaled input, as in the paper; "v_prediction": subtracted.
        final_sigmas_type: What comes after the last sigma.

    Raises:
        ValueError: A value is out of its range.

    Source: Karras et al. (arXiv:2206.00364), table 1; diffusers' EDMEulerScheduler.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: SigmaSchedule = "karras"
    rho: float = 7.0
    prediction_type: PredictionType = "epsilon"
    final_sigmas_type: FinalSigma = "zero"

    def __post_init__(self) -> None:
        _require_names(self, final_sigmas_type=FinalSigma)
        _require_positive(self, "sigma_min", "sigma_max", "sigma_data", "rho")
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_max must be above sigma_min={self.sigma_min}, got {self.sigma_max}")
        for name, allowed in (("sigma_schedule", ("karras", "exponential")), ("prediction_type", ("epsilon", "v_prediction"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")


def _require_names(config: Any, **names: Any) -> None:
    for name, allowed in names.items():
        if getattr(config, name) not in get_args(allowed):
            raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(allowed)))}, got {getattr(config, name)!r}")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")


def _stable_diffusion(**fields: Any) -> DiffusionScheduleConfig:
    """Betas that Stable Diffusion 1, 2 and XL have in common."""
    return DiffusionScheduleConfig(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False, **fields
    )


DIFFUSION_SCHEDULE_PRESETS: Mapping[str, DiffusionScheduleConfig] = MappingProxyType(
    {
        "ddpm": DiffusionScheduleConfig(clip_sample=True, variance_type="fixed_large"),
        "improved-ddpm": DiffusionScheduleConfig(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
        "dit": DiffusionScheduleConfig(variance_type="learned_range"),
        "stable-diffusion-1": _stable_diffusion(),
        "stable-diffusion-2.1": _stable_diffusion(prediction_type="v_prediction"),
        "stable-diffusion-xl": _stable_diffusion(),
        "zero-snr": _stable_diffusion(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
    }
)
FLOW_SCHEDULE_PRESETS: Mapping[str, FlowScheduleConfig] = MappingProxyType(
    {
        "rectified-flow": FlowScheduleConfig(),
        "stable-diffusion-3": FlowScheduleConfig(shift=3.0),
        "flux-dev": FlowScheduleConfig(shift=3.0, use_dynamic_shifting=True, first_sigmas="1 - n / num_steps"),
        "flux-schnell": FlowScheduleConfig(first_sigmas="1 - n / num_steps"),
        "ltx-video": FlowScheduleConfig(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1,
            first_sigmas="1 - n / num_steps",
        ),
    }
)  # fmt: skip
EDM_SCHEDULE_PRESETS: Mapping[str, EDMScheduleConfig] = MappingProxyType(
    {"edm": EDMScheduleConfig(), "playground-2.5": EDMScheduleConfig()}
)
