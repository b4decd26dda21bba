"""Frozen configurations, shared by the PyTorch and the JAX references, with presets of published models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

ScoreFunction = Literal["sigmoid", "softmax"]
VelocitySign = Literal["noise - data", "data - noise"]
TimestepSampling = Literal["uniform", "logit-normal"]
SecondExpertPolicy = Literal["all", "sampling", "random"]
GeluApproximation = Literal["none", "tanh"]

E4M3_MAX = 448.0  # the largest number of float8_e4m3fn
SMALLEST_WEIGHT_SUM = 2.0**-23  # what `gshard_top2` divides by at least: float32's epsilon, as in public models


@dataclass(frozen=True)
class DiTConfig:
    """A diffusion transformer with adaLN-Zero blocks; names as in the code that came with the paper.

    Attributes:
        input_size: Height and width of the latents; a multiple of `patch_size`.
        patch_size: Height and width of a patch, which becomes one token.
        in_channels: Channels of the latents.
        hidden_size: Width of a token; a multiple of `num_heads`, and of 4 for the position embedding.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Width of a block's hidden layer, in units of `hidden_size`.
        num_classes: Classes; the embedding table has one row more, for the label that was dropped.
        learn_sigma: Whether the variance is predicted too, which doubles the output channels.
        norm_eps: Added to the variance by the second LayerNorm of a block (diffusers: 1e-5); the first one and the final one
            have 1e-6.
        frequency_embedding_size: Width of the sinusoidal timestep embedding; even.
        frequency_shift: The lowest frequency is 1 / 10000 ** ((n - 1) / (n - frequency_shift)) with n of them; the paper's
            code has 0, diffusers 1.

    Raises:
        ValueError: Sizes are not positive or do not fit together.

    Source: Peebles and Xie 2022 (arXiv:2212.09748), section 3 and table 1; facebookresearch/DiT models.py.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    norm_eps: float = 1e-6
    frequency_embedding_size: int = 256
    frequency_shift: int = 0

    def __post_init__(self) -> None:
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name, divisor in (("input_size", self.patch_size), ("hidden_size", self.num_heads), ("hidden_size", 4)):
            if getattr(self, name) % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {getattr(self, name)}")
        if self.frequency_embedding_size < 4 or self.frequency_embedding_size % 2:
            raise ValueError(f"frequency_embedding_size must be even and at least 4, got {self.frequency_embedding_size}")
        if self.frequency_shift not in (0, 1):
            raise ValueError(f"frequency_shift must be 0 or 1, got {self.frequency_shift}")

    @property
    def out_channels(self) -> int:
        """Channels of the result."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def num_patches(self) -> int:
        """Tokens of one image."""
        return (self.input_size // self.patch_size) ** 2


@dataclass(frozen=True)
class DiTMoEConfig:
    """How an MoE layer of DiT-MoE chooses and weighs experts, and by what loss their load is kept even.

    As they stand, these are the options of all public checkpoints of DiT-MoE.

    Attributes:
        top_k: Experts per token.
        aux_loss_alpha: Multiplies the auxiliary loss; 0 for none.
        per_sample: Whether the auxiliary loss is that of each sample's tokens by themselves, averaged over the samples, and not
            that of all tokens of the batch (`seq_aux` of the public code).
        scores: What experts are chosen by and weighted with, the softmax or the sigmoids of the router's logits.
        num_groups: Groups of consecutive experts; divides their number.
        topk_groups: Groups a token may choose from, those of the highest single score, 1 to num_groups.
        renormalize: Whether the weights of a token are divided by their sum, plus 1e-20 (`norm_topk_prob`).
        routed_scaling_factor: Multiplies every weight, renormalized or not.

    Raises:
        ValueError: A value is out of its range.

    Source: Fei et al. 2024 (arXiv:2407.11633), section 2; `MoEGate` of feizc/DiT-MoE models.py. Sigmoids, groups, renormalized
    weights and their factor are the gates that EasyDeL's port has names for; its own code of them never ran. Unlike ours, it
    multiplies by the factor only where it does not renormalize, and feizc's leaves the weights of a single expert per token as
    they are.
    """

    top_k: int = 2
    aux_loss_alpha: float = 0.01
    per_sample: bool = False
    scores: ScoreFunction = "softmax"
    num_groups: int = 1
    topk_groups: int = 1
    renormalize: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        for name in ("top_k", "num_groups", "topk_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.topk_groups > self.num_groups:
            raise ValueError(f"topk_groups must be in 1..num_groups={self.num_groups}, got {self.topk_groups}")
        if not 0 <= self.aux_loss_alpha < math.inf:
            raise ValueError(f"aux_loss_alpha must be finite and not negative, got {self.aux_loss_alpha}")
        if not math.isfinite(self.routed_scaling_factor):
            raise ValueError(f"routed_scaling_factor must be finite, got {self.routed_scaling_factor}")
        if self.scores not in get_args(ScoreFunction):
            raise ValueError(f"scores must be {' or '.join(map(repr, get_args(ScoreFunction)))}, got {self.scores!r}")


def _dit(hidden_size: int, depth: int, num_heads: int, patch_size: int) -> DiTConfig:
    return DiTConfig(hidden_size=hidden_size, depth=depth, num_heads=num_heads, patch_size=patch_size)


_DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
DIT_PRESETS: Mapping[str, DiTConfig] = MappingProxyType(
    {f"DiT-{name}/{patch}": _dit(*sizes, patch) for name, sizes in _DIT_SIZES.items() for patch in (2, 4, 8)}
)


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
