"""An upcycled GPT-2 small enough for tests of its training, batches for it, and a state in the middle of a run."""

from dataclasses import replace

import torch

from gaugeblock.reference.configs import IGNORED_LABEL, MoELMConfig, UpcycledGPT2Config
from gaugeblock.reference.torch import train_moe_lm, upcycled_gpt2

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

MODEL = UpcycledGPT2Config(
    vocab_size=11, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=6,
    moe_layers=(0, 2), num_experts=13,
)  # fmt: skip
CONFIG = MoELMConfig(
    MODEL, learning_rate=1e-2, learning_rate_schedule="cosine", num_warmup_steps=2, num_training_steps=20, weight_decay=0.1,
    balance_coefficient=0.5, z_coefficient=0.1, noise_std=0.5, accumulation_steps=2,
)  # fmt: skip
ONE = replace(CONFIG, accumulation_steps=1)


def batch(size: int = 4, seed: int = 0, num_tokens: int = 4) -> Batch:
    """Return input_ids, labels that are the same, and example ids."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(11, (size, num_tokens), generator=generator)
    return input_ids, input_ids.clone(), torch.randint(2**32, (size,), generator=generator)


def padded(size: int = 5, seed: int = 0) -> Batch:
    """Return a batch in which some tokens are not to be predicted, of a sequence none."""
    input_ids, labels, ids = batch(size, seed)
    labels[0, 2:], labels[1, :], labels[2, 0] = IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL
    return input_ids, labels, ids


def trained_state(config: MoELMConfig = CONFIG, step: int = 7) -> dict[str, torch.Tensor]:
    """Return a state in float64 in the middle of a run, whose experts have had updates of different numbers."""
    generator = torch.Generator().manual_seed(1)
    shapes = upcycled_gpt2.state_shapes(config.model)
    empty = train_moe_lm.initial_state({name: torch.zeros(shape) for name, shape in shapes.items()}, config=config)
    state = {}
    for name, tensor in empty.items():
        normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name == "step":
            state[name] = torch.tensor(step)
        elif name.startswith("num_updates."):
            state[name] = torch.randint(step, tensor.shape, generator=generator)
        elif name.startswith("exp_avg_sq."):
            state[name] = 1e-3 * (0.5 + normal.square())
        else:
            state[name] = (0.03 if name.startswith("exp_avg.") else 0.4) * normal
    return state
