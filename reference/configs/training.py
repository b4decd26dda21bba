"""What all training runs have in common: their optimizer, accumulation, precision, and the average of their parameters."""

from dataclasses import dataclass, fields
from typing import get_args

from gaugeblock.reference.configs.options import ComputeDType, LearningRateSchedule, Optimizer


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """An exponential moving average of the parameters, for sampling.

    At the i-th update, counted from 1, the average keeps the share d of itself:

        k = i - update_after_step - 1
        d = 0                                    if k <= 0
            1 - (1 + k / inv_gamma)**-power      with warmup
            (1 + k) / (10 + k)                   else
        d = max(min(d, decay), min_decay)        if k > 0

    Attributes:
        decay, min_decay: The most and the least that it keeps, once it is an average.
        update_after_step: Updates before which it is a copy.
        warmup: Which of the two formulas.
        inv_gamma, power: Of the first.

    Raises:
        ValueError: A value is out of its range.

    Source: diffusers' training_utils.py, EMAModel.
    """

    decay: float = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0
    warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        if not 0 <= self.min_decay <= self.decay <= 1:
            raise ValueError(f"min_decay and decay must rise within [0, 1], got {self.min_decay} and {self.decay}")
        if self.update_after_step < 0:
            raise ValueError(f"update_after_step must not be negative, got {self.update_after_step}")
        for name in ("inv_gamma", "power"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What the configs of all trainers begin with.

    Attributes:
        seed: Of all draws (`random.py`).
        optimizer: By its name in torch.optim.
        learning_rate, weight_decay: Of the optimizer, for all parameters alike; AdamW decays beside the gradient, others in it.
        learning_rate_schedule: What becomes of the learning rate once it is warm: it stays, or falls to 0 at num_training_steps,
            in a line or as half a wave of a cosine does; it stays there from then on.
        num_warmup_steps: Updates over which it rises from 0, in a line.
        first_warmup_step: Where on that line the first update is: 0, at a learning rate of 0, or 1.
        final_learning_rate_ratio: What is left of the learning rate where it has fallen, in place of 0.
        num_training_steps: Of the whole run; None for one whose learning rate stays.
        beta1, beta2, adam_epsilon: Of AdamW and Adam.
        momentum: Of SGD.
        max_gradient_norm: The global norm to which gradients are clipped.
        accumulation_steps: Microbatches whose gradients are added up before an update.
        compute_dtype: Of parameters and data where losses and gradients are computed; None for that of the state, which the
            optimizer always has.
        loss_scale: What is differentiated is so many times the loss, so that small gradients outlive a small `compute_dtype`;
            gradients are divided by it.
        activation_checkpointing: Whether what is computed within a block is computed again in the backward pass, rather than kept
            for it. In PyTorch no bit of the result depends on it; in JAX roundings do, since XLA fuses other operations.
        ema: Of the parameters; None for no average.

    Raises:
        ValueError: A value is out of its range.
    """

    seed: int = 0
    optimizer: Optimizer = "adamw"
    learning_rate: float = 1e-4
    learning_rate_schedule: LearningRateSchedule = "constant"
    num_warmup_steps: int = 0
    first_warmup_step: int = 0
    final_learning_rate_ratio: float = 0.0
    num_training_steps: int | None = None
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    adam_epsilon: float = 1e-8
    momentum: float = 0.9
    max_gradient_norm: float = 1.0
    accumulation_steps: int = 1
    compute_dtype: ComputeDType | None = None
    loss_scale: float = 1.0
    activation_checkpointing: bool = False
    ema: EMAConfig | None = None

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        for name in ("learning_rate", "adam_epsilon", "max_gradient_norm", "accumulation_steps", "loss_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in 0..2**64 - 1, got {self.seed}")
        if self.num_warmup_steps < 0:
            raise ValueError(f"num_warmup_steps must not be negative, got {self.num_warmup_steps}")
        if self.first_warmup_step not in (0, 1):
            raise ValueError(f"first_warmup_step must be 0 or 1, got {self.first_warmup_step}")
        if not 0 <= self.final_learning_rate_ratio <= 1:
            raise ValueError(f"final_learning_rate_ratio must be in [0, 1], got {self.final_learning_rate_ratio}")
        if self.num_training_steps is None and self.learning_rate_schedule != "constant":
            raise ValueError(
                f"num_training_steps must be given for learning_rate_schedule {self.learning_rate_schedule!r}, got None"
            )
        if self.num_training_steps is not None and self.num_training_steps < max(1, self.num_warmup_steps):
            least = f"at least 1 and num_warmup_steps, {self.num_warmup_steps}"
            raise ValueError(f"num_training_steps must be {least}, got {self.num_training_steps}")
        require_options(
            self,
            optimizer=get_args(Optimizer),
            learning_rate_schedule=get_args(LearningRateSchedule),
            compute_dtype=(None, *get_args(ComputeDType)),
        )

    @property
    def moments(self) -> tuple[str, ...]:
        """What the optimizer keeps of each parameter, by torch's names."""
        return ("momentum_buffer",) if self.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")

    @property
    def parts(self) -> tuple[str, ...]:
        """What a run's state has of each parameter."""
        return ("model", *self.moments, *(("ema",) if self.ema else ()))


def require_options(config: object, **allowed: tuple[str | None, ...]) -> None:
    """Raise ValueError where a field of a config has none of the values that it may have."""
    assert set(allowed) <= {field.name for field in fields(config)}  # type: ignore[arg-type]
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{name} must be {' or '.join(map(repr, values))}, got {getattr(config, name)!r}")
