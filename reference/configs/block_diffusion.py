"""A training run of a masked or block diffusion language model."""

from dataclasses import dataclass
from typing import get_args

from gaugeblock.reference.configs.language_models import LanguageModelConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.configs.options import LossMean, MaskTimes, MaskWeighting
from gaugeblock.reference.configs.training import TrainingConfig, require_options


@dataclass(frozen=True)
class BlockDiffusionConfig(TrainingConfig):
    """One training run of SDAR, SDAR-MoE, LLaDA or Dream; with the attributes of `TrainingConfig`.

    As published:

                            times_of    least_share  weighting                   mean_over
        LLaDA, pretraining  "sequence"  1e-3         "inverse"                   "tokens"
        LLaDA, fine-tuning  "sequence"  1e-3         "inverse"                   "examples"
        SDAR                "sample"    1e-3         "inverse"                   "tokens"
        BD3-LM              "block"     1e-3         "inverse"                   "tokens", antithetic, excludes_mask_token
        Dream-Coder         "sequence"  0            "inverse", "linear", "cart"  "masked"

    Attributes:
        model: The model; SDAR's predict blocks from their noisy copies and the clean ones before them.
        times_of: What has a time t of its own, uniform in [0, 1): a sequence, each of the samples that are packed into it, or
            each block of those.
        antithetic: Whether the times of a sequence are spread evenly: (t + k / count) mod 1 for the k-th of them, t that of the
            first one.
        least_share, greatest_share: A token is masked with probability p, which rises from the first to the second, in a line,
            as t goes from 0 to 1. BD3-LM's clipped schedules have others than 0 and 1.
        weighting: What a masked token's loss is multiplied by: 1 / p; 1, for BD3-LM's schedules whose least share is above a
            half; 1 - p; or `cart`, the more the nearer tokens of its sample are that are seen.
        cart_p: Of the geometric distribution by which those are near.
        mean_over: What the sum of losses is divided by: the tokens that may be masked; those that are; or first for each example
            by the tokens of its own that may be masked, then by the number of examples. Each is counted over the whole batch.
        excludes_mask_token: Whether no probability is left to the mask token.

    Raises:
        ValueError: A value is out of its range, or the model has no blocks whose times could be drawn.

    Source: Nie et al. 2025 (arXiv:2502.09992), algorithms 1 and 2; Cheng et al. 2025 (arXiv:2510.06303) and JetAstra/SDAR,
    modeling_sdar.py; Arriola et al. 2025 (arXiv:2503.09573), sections 3 to 5; Ye et al. 2025 (arXiv:2508.15487), section 3, and
    DreamLM/Dream-Coder.
    """

    model: LanguageModelConfig
    times_of: MaskTimes = "sample"
    antithetic: bool = False
    least_share: float = 1e-3
    greatest_share: float = 1.0
    weighting: MaskWeighting = "inverse"
    cart_p: float = 0.1
    mean_over: LossMean = "tokens"
    excludes_mask_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.least_share <= self.greatest_share <= 1 and self.greatest_share > 0):
            raise ValueError(
                "least_share and greatest_share must rise within [0, 1] and not both be 0, "
                f"got {self.least_share} and {self.greatest_share}"
            )
        if not 0 < self.cart_p < 1:
            raise ValueError(f"cart_p must be in (0, 1), got {self.cart_p}")
        require_options(self, times_of=get_args(MaskTimes), weighting=get_args(MaskWeighting), mean_over=get_args(LossMean))
        if self.times_of == "block" and not isinstance(self.model, SDARConfig | SDARMoEConfig):
            name = type(self.model).__name__
            raise ValueError(f"times_of must be 'sequence' or 'sample' for {name}, whose model has no blocks, got 'block'")
