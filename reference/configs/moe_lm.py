"""A training run of a language model with a mixture of experts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from gaugeblock.reference.configs.training import TrainingConfig
from gaugeblock.reference.configs.upcycled_gpt2 import UPCYCLED_GPT2_PRESETS, UpcycledGPT2Config


@dataclass(frozen=True)
class MoELMConfig(TrainingConfig):
    """One training run of an upcycled GPT-2; with the attributes of `TrainingConfig`.

    Attributes:
        model: The model.
        balance_coefficient: By which the balance loss is multiplied (`lb_coef`).
        z_coefficient: By which the z-loss is.
        noise_std: Deviation of the routers' noise in the first step.
        anneal_fraction: Of `num_training_steps`, over which the noise falls to 0; where that is None there is none.

    Raises:
        ValueError: A value is out of its range.

    Source: sumitdotml/moe-emergence, `moe_emergence/train.py`.
    """

    model: UpcycledGPT2Config
    balance_coefficient: float = 0.01
    z_coefficient: float = 0.001
    noise_std: float = 0.1
    anneal_fraction: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("balance_coefficient", "z_coefficient", "noise_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more and finite, got {getattr(self, name)}")
        if not 0 <= self.anneal_fraction <= 1:
            raise ValueError(f"anneal_fraction must be in [0, 1], got {self.anneal_fraction}")

    @property
    def noised_steps(self) -> int:
        """How many steps have noise, the first ones."""
        return int((self.num_training_steps or 0) * self.anneal_fraction)


def _run(steps: int, balance_coefficient: float = 0.01, noise_std: float = 0.1) -> MoELMConfig:
    """A run of so many steps, of which a tenth are warm-up; batches are 8 sequences of 512 tokens."""
    return MoELMConfig(
        UPCYCLED_GPT2_PRESETS["moe-main"],
        seed=42,
        learning_rate=5e-5,
        learning_rate_schedule="cosine",
        num_warmup_steps=int(0.1 * steps),
        num_training_steps=steps,
        weight_decay=0.01,
        accumulation_steps=4,
        balance_coefficient=balance_coefficient,
        noise_std=noise_std,
    )


MOE_LM_PRESETS: Mapping[str, MoELMConfig] = MappingProxyType(
    {
        "moe-main": _run(10000),
        "top2": replace(_run(3000), model=UPCYCLED_GPT2_PRESETS["top2"]),
        "no-lb": _run(2000, balance_coefficient=0.0, noise_std=0.0),
        "dense": replace(_run(5000), model=UPCYCLED_GPT2_PRESETS["dense"]),
    }
)
"""moe-emergence's presets."""
