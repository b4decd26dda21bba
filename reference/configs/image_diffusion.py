"""A training run of an image diffusion model."""

from dataclasses import dataclass
from typing import get_args

from gaugeblock.reference.configs.dit import DiTConfig
from gaugeblock.reference.configs.dit_moe import DiTMoEModelConfig
from gaugeblock.reference.configs.flux import FluxConfig
from gaugeblock.reference.configs.mmdit import MMDiTConfig
from gaugeblock.reference.configs.options import PredictionType, SnrOfTimes, TimestepSampling, VelocitySign
from gaugeblock.reference.configs.training import TrainingConfig, require_options
from gaugeblock.reference.configs.unet import UNetConfig

ClassModelConfig = DiTConfig | DiTMoEModelConfig
TextModelConfig = UNetConfig | FluxConfig | MMDiTConfig
ImageModelConfig = ClassModelConfig | TextModelConfig
PREDICTION_TYPES: tuple[PredictionType, ...] = "flow_prediction", "epsilon", "sample"


@dataclass(frozen=True)
class ImageDiffusionConfig(TrainingConfig):
    """One training run of an image diffusion model on rectified flow; with the attributes of `TrainingConfig`.

    Attributes:
        model: The model; DiT and DiT-MoE are told classes, the others texts.
        label_dropout: Probability that an example's class or text is dropped, for classifier-free guidance: `num_classes` takes
            the place of the class, 0 that of the text.
        prediction_type: What the model predicts: the velocity, the noise or the image.
        velocity: Which way a predicted velocity points.
        timestep_sampling: Of the times in [0, 1]: uniform; the sigmoid of a standard normal; with the mode in the middle; or of
            thousandths of which the earlier or the later ones are drawn more often.
        bias_multiplier, bias_portion: How much more often, and which portion of them.
        min_snr_gamma: What the weights of errors are clipped by; None for no weights.
        snr: What those weights take for the ratio of signal and noise.

    Raises:
        ValueError: A value is out of its range.

    Source: Liu et al. 2022 (arXiv:2209.03003); Esser et al. 2024 (arXiv:2403.03206), sections 2 and 3.1; Hang et al. 2023
    (arXiv:2303.09556).
    """

    model: ImageModelConfig
    label_dropout: float = 0.1
    prediction_type: PredictionType = "flow_prediction"
    velocity: VelocitySign = "noise - data"
    timestep_sampling: TimestepSampling = "uniform"
    bias_multiplier: float = 1.0
    bias_portion: float = 0.25
    min_snr_gamma: float | None = None
    snr: SnrOfTimes = "data over noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("label_dropout", "bias_portion"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("bias_multiplier", "min_snr_gamma"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        require_options(
            self,
            prediction_type=PREDICTION_TYPES,
            velocity=get_args(VelocitySign),
            timestep_sampling=get_args(TimestepSampling),
            snr=get_args(SnrOfTimes),
        )
        if isinstance(self.model, ClassModelConfig) and self.model.learn_sigma:
            raise ValueError("model.learn_sigma must be False: what is trained here predicts one image alone")
