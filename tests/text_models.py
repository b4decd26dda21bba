"""Small language models in a training run: configs, states and batches."""

from typing import Any

import torch
from trained_models import draws

from gaugeblock.reference.configs import BlockDiffusionConfig, DreamConfig, EMAConfig, LLaDAConfig, SDARConfig, SDARMoEConfig
from gaugeblock.reference.torch import language_models, training

# sizes that differ pairwise, so that none can stand for another
SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "rms_norm_eps": 1e-3, "rope_theta": 100.0, "mask_token_id": 19,
}  # fmt: skip
MODELS = {
    "sdar": SDARConfig(**SMALL, intermediate_size=10, block_length=3),
    "moe": SDARMoEConfig(**SMALL, moe_intermediate_size=7, block_length=3, num_experts=5, num_experts_per_tok=2),
    "llada": LLaDAConfig(**SMALL, intermediate_size=10),
    "dream": DreamConfig(**SMALL, intermediate_size=10),
}
# of public trainers
KINDS: dict[str, dict[str, Any]] = {
    "sdar": {"model": MODELS["sdar"]},
    "moe": {"model": MODELS["moe"], "optimizer": "adam", "ema": EMAConfig(warmup=True)},
    "bd3-lm": {"model": MODELS["sdar"], "times_of": "block", "antithetic": True, "excludes_mask_token": True},
    "clipped": {
        "model": MODELS["sdar"], "times_of": "block", "least_share": 0.55, "greatest_share": 0.95, "weighting": "none",
        "optimizer": "sgd",
    },
    "llada": {"model": MODELS["llada"], "times_of": "sequence"},
    "llada, tuned": {"model": MODELS["llada"], "times_of": "sequence", "mean_over": "examples"},
    "dream": {"model": MODELS["dream"], "times_of": "sequence", "least_share": 0.0, "weighting": "cart", "mean_over": "masked"},
    "dream, linear": {"model": MODELS["dream"], "least_share": 0.0, "weighting": "linear", "mean_over": "masked"},
}  # fmt: skip
NUM_TOKENS = 11
# one sample with padding; two; three, the second of one token; padding alone; one without padding
SAMPLES = torch.tensor([
    [3] * 8 + [-1] * 3, [0] * 5 + [1] * 6, [4] * 4 + [2] + [9] * 4 + [-1] * 2, [-1] * 11, [7] * 11,
])  # fmt: skip


def config_of(kind: str, **changes: Any) -> BlockDiffusionConfig:
    return BlockDiffusionConfig(**{"learning_rate": 1e-2, "weight_decay": 0.1, "seed": 5} | KINDS[kind] | changes)


def state_of(config: BlockDiffusionConfig) -> dict[str, torch.Tensor]:
    """In float64, in the middle of a run, none of them 0."""
    shapes = language_models.state_shapes(config.model)
    parameters = {
        name: draws(*shape, seed=place) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        for place, (name, shape) in enumerate(shapes.items())
    }
    state = training.initial_state(parameters, config=config)
    return state | {
        name: 0.01 * draws(*each.shape, seed=99 + place).abs()
        for place, (name, each) in enumerate(state.items())
        if name.startswith(("exp_avg", "momentum"))
    }


def batch_of(size: int = 5) -> tuple[torch.Tensor, ...]:
    """Tokens, labels, samples and ids; a prompt of another length in each sequence, and labels on padding, which do not count."""
    ids = (draws(size, NUM_TOKENS, seed=1).abs() * 1000).long() % 19
    labels = ids.masked_fill(torch.arange(NUM_TOKENS) < torch.arange(size)[:, None] % 4, -100)
    samples = SAMPLES.repeat(1 + size // 5, 1)[:size]
    return ids, labels, samples, torch.arange(7, 7 + size) * 1001
