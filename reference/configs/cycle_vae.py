"""A training run of text-latent diffusion with cycles."""

from dataclasses import dataclass
from typing import get_args

from gaugeblock.reference.configs.options import CycleVAEMode, LatentTimeMode, PredictionType, PseudoTokens
from gaugeblock.reference.configs.text_latent_mmdit import TextLatentMMDiTConfig
from gaugeblock.reference.configs.training import TrainingConfig, require_options

LATENT_PREDICTIONS: tuple[PredictionType, ...] = "epsilon", "sample", "v_prediction"


@dataclass(frozen=True)
class CycleVAEConfig(TrainingConfig):
    """One training run of a text-latent MMDiT in both directions and in cycles; with the attributes of `TrainingConfig`.

    Text to latent (T2L) predicts a noised latent from its text, latent to text (L2T) all tokens of a text from its latent. The
    cycle T2L2T predicts a text from the latent that T2L predicted, L2T2L a latent from the text that L2T predicted.

    Defaults are those that the public project recommends: its configurations have weights of 1 from the first update on.

    Attributes:
        model: What is trained.
        mask_token_id: What stands at every place of a text that is to be predicted.
        mode: "cycle" for all of it; "t2l" for T2L alone, where what is the text's own (`text_encoder`, `text_head`) is frozen, or
            "l2t" for L2T alone, where what is the latent's own (`latent_encoder`, `latent_head`) is.
        prediction_type: What is predicted of a noised latent: its noise, itself ("x0" there), or the velocity ("v_param").
        latent_t_mode: Of the times that latents are noised at: uniform from latent_t_min to latent_t_max, or all 1. At time 1
            latents that are predicted by their noise are 64,171 times as large as the error, and cycles learn next to nothing.
        latent_t_min, latent_t_max: Of "random".
        latent_loss_weight: Of T2L's loss, but not of L2T2L's.
        cycle_text_weight, cycle_latent_weight: Of T2L2T's loss and of L2T2L's, once they are whole; 0 for no such cycle.
        cycle_text_warmup_steps, cycle_latent_warmup_steps: Updates before which the weight is 0.
        cycle_text_ramp_steps, cycle_latent_ramp_steps: Updates after those over which it rises, in a line; 0 for none.
        cycle_every: After how many updates the cycles change places, where they take turns: T2L2T comes first; None where both
            are in every update. It has no model in public code.
        cycle_stop_grad_latent: Whether T2L2T's loss is not differentiated by the predicted latent.
        cycle_latent_sampling: How L2T2L's text is chosen: the most probable token of each place, or one that is drawn.
        cycle_latent_temperature: What logits are divided by before a token is drawn. It has no model in public code.

    Raises:
        ValueError: A value is out of its range.

    Source: Joshua-Zhang-Jiaquan/LGDLM cycle_vae_impl/trainers/cycle_vae_trainer.py; what is frozen in single modes:
    latentDLM_mmdit/improved_trainer_stable.py.
    """

    model: TextLatentMMDiTConfig
    mask_token_id: int
    mode: CycleVAEMode = "cycle"
    prediction_type: PredictionType = "epsilon"
    latent_t_mode: LatentTimeMode = "random"
    latent_t_min: float = 0.0
    latent_t_max: float = 0.98
    latent_loss_weight: float = 0.1
    cycle_text_weight: float = 0.1
    cycle_text_warmup_steps: int = 0
    cycle_text_ramp_steps: int = 10_000
    cycle_latent_weight: float = 0.1
    cycle_latent_warmup_steps: int = 0
    cycle_latent_ramp_steps: int = 10_000
    cycle_every: int | None = None
    cycle_stop_grad_latent: bool = True
    cycle_latent_sampling: PseudoTokens = "argmax"
    cycle_latent_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_token_id < self.model.vocab_size:
            raise ValueError(f"mask_token_id must be in 0..{self.model.vocab_size - 1}, got {self.mask_token_id}")
        require_options(
            self,
            mode=get_args(CycleVAEMode),
            prediction_type=LATENT_PREDICTIONS,
            latent_t_mode=get_args(LatentTimeMode),
            cycle_latent_sampling=get_args(PseudoTokens),
        )
        if not 0 <= self.latent_t_min < self.latent_t_max <= 1:
            raise ValueError(
                f"latent_t_min and latent_t_max must rise within [0, 1], got {self.latent_t_min} and {self.latent_t_max}"
            )
        for name in ("latent_loss_weight", "cycle_text_weight", "cycle_latent_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for cycle in ("cycle_text", "cycle_latent"):
            for name in (f"{cycle}_warmup_steps", f"{cycle}_ramp_steps"):
                if getattr(self, name) < 0:
                    raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.cycle_every is not None and self.cycle_every < 1:
            raise ValueError(f"cycle_every must be positive, or None, got {self.cycle_every}")
        if not self.cycle_latent_temperature > 0:
            raise ValueError(f"cycle_latent_temperature must be positive, got {self.cycle_latent_temperature}")
