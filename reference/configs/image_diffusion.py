"""A training run of an image diffusion model."""

from dataclasses import dataclass
from typing import get_args

from gaugeblock.reference.configs.dit import DiTConfig
from gaugeblock.reference.configs.options import TimestepSampling, VelocitySign


@dataclass(frozen=True)
class ImageDiffusionConfig:
    """One training run of a class-conditional image diffusion model on rectified flow.

    Attributes:
        model: The model.
        seed: Of all draws (`random.py`).
        learning_rate, beta1, beta2, adam_epsilon, weight_decay: Of AdamW, for all parameters alike.
        max_gradient_norm: The global norm to which gradients are clipped.
        label_dropout: Probability that an example's label is replaced by `num_classes`, for classifier-free guidance.
        velocity: Which way the predicted velocity points.
        timestep_sampling: Of the times in [0, 1): uniform, or the sigmoid of a standard normal.
        accumulation_steps: Microbatches whose gradients are added up before an update.

    Raises:
        ValueError: A value is out of its range.

    Source: Liu et al. 2022 (arXiv:2209.03003); Esser et al. 2024 (arXiv:2403.03206), sections 2 and 3.1.
    """

    model: DiTConfig
    seed: int = 0
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    label_dropout: float = 0.1
    velocity: VelocitySign = "noise - data"
    timestep_sampling: TimestepSampling = "uniform"
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in [0, 1], got {self.label_dropout}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name in ("learning_rate", "adam_epsilon", "max_gradient_norm", "accumulation_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0..2**64 - 1, got {self.seed}")
        for name, allowed in (("velocity", get_args(VelocitySign)), ("timestep_sampling", get_args(TimestepSampling))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        if self.model.learn_sigma:
            raise ValueError("model.learn_sigma must be False: rectified flow predicts a velocity alone")
