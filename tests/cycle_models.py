"""Small runs of text-latent diffusion with cycles: configs, states and batches."""

from typing import Any

import torch
from stable_models import parameters_of
from trained_models import draws

from gaugeblock.reference.configs import CycleVAEConfig, EMAConfig, TextLatentMMDiTConfig
from gaugeblock.reference.torch import text_latent_mmdit
from gaugeblock.reference.torch import train_cycle_vae as trainer

MODEL = TextLatentMMDiTConfig(
    vocab_size=12, latent_dim=5, hidden_size=8, n_blocks=1, cond_dim=6, max_seq_len=7, cluster_size=2, num_residual_streams=2
)
KINDS: dict[str, dict[str, Any]] = {
    "as it is published": {},
    "velocity": {"prediction_type": "v_prediction", "cycle_stop_grad_latent": False, "cycle_latent_sampling": "categorical"},
    "latents": {"prediction_type": "sample", "latent_t_mode": "full", "ema": EMAConfig(warmup=True)},
    "t2l": {"mode": "t2l"},
    "l2t": {"mode": "l2t"},
}
STEP = 7


def config_of(kind: str, **changes: Any) -> CycleVAEConfig:
    """After its ramps, in the middle of one of them."""
    ordinary = {
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "latent_loss_weight": 0.5,
        "cycle_text_weight": 0.5,
        "cycle_text_ramp_steps": 10,
        "cycle_latent_weight": 0.75,
        "cycle_latent_ramp_steps": 5,
        "latent_t_max": 0.9,
    }
    return CycleVAEConfig(MODEL, 11, **ordinary | KINDS[kind] | changes)


def state_of(config: CycleVAEConfig) -> dict[str, torch.Tensor]:
    """In float64, at step 7, no gradient of which is 0 by design."""
    state = trainer.state_of(parameters_of(text_latent_mmdit.state_shapes(config.model), 0), config=config)
    return state | {"step": torch.tensor(STEP)}


def batch_of(size: int = 5) -> tuple[torch.Tensor, ...]:
    """Tokens, latents, a mask with padding, and ids of examples, two of them the same."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand((size, 4), generator=generator) < 0.7
    ids = torch.randint(0, 11, (size, 4), generator=generator)
    example_ids = torch.arange(7, 7 + size)
    example_ids[-1] = example_ids[0]
    return ids, draws(size, 5), mask, example_ids
