"""The MoE layer of DiT-MoE."""

import math
from dataclasses import dataclass
from typing import get_args

from gaugeblock.reference.configs.options import ScoreFunction


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
