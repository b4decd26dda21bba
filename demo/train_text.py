"""Train a small SDAR, character by character, on this repository's documents, in PyTorch and in JAX from the same draws.

    python demo/train_text.py [--steps 1500] [--folder demo]

Both runs start from the same parameters, see the same sequences and draw the same masks. How far apart their losses may lie is
measured as by `train_digits.py`. Writes text_loss.png, and the PyTorch run's model, in half precision, to
text_model.safetensors.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import texts
import torch
import training
from safetensors.torch import save_file

from gaugeblock.optimized.jax import train_block_diffusion as jax_step
from gaugeblock.reference.configs import BlockDiffusionConfig, SDARConfig
from gaugeblock.reference.torch import sdar, train_block_diffusion
from gaugeblock.reference.torch import training as trainer

MODEL = SDARConfig(
    vocab_size=texts.MASK_ID + 1, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-6, rope_theta=1e4, mask_token_id=texts.MASK_ID, block_length=4,
)  # fmt: skip
SEED, BATCH_SIZE, LENGTH, STEPS = 3, 16, 64, 1500
STATED_LOSS = 1.95  # nats for each character: the mean over the last tenth of STEPS steps; the first is 4.8


def config_of(step: int, num_steps: int) -> BlockDiffusionConfig:
    """Times of blocks, those of a sequence spread evenly; a learning rate that moves in few stages, since JAX compiles each."""
    stages = ((0.02, 0.2), (0.6, 1.0), (0.85, 0.3), (1.0, 0.1))
    factor = next(factor for end, factor in stages if step < end * num_steps or end == 1.0)
    optimizer = {"learning_rate": 3e-3 * factor, "beta2": 0.99, "weight_decay": 0.01}
    return BlockDiffusionConfig(model=MODEL, seed=SEED, times_of="block", antithetic=True, **optimizer)


def initial_state() -> dict[str, torch.Tensor]:
    """New parameters, moments of 0, step 0."""
    parameters = training.initial_parameters(sdar.state_shapes(MODEL), SEED)
    return trainer.initial_state(parameters, config=config_of(0, STEPS))


def train_torch(num_steps: int, advance: training.Advance) -> training.Run:
    """Train with the PyTorch reference."""

    def step(state: dict[str, torch.Tensor], *batch: torch.Tensor) -> tuple:
        return train_block_diffusion.train_step(state, *batch, config=config_of(int(state["step"]), num_steps))

    return training.run_torch(step, initial_state(), texts.batches(num_steps, BATCH_SIZE, LENGTH, SEED), advance)


def train_jax(num_steps: int, advance: training.Advance, disturbed_by: int | None = None) -> training.Run:
    """Train with the jitted JAX step, from the same parameters; as `training.run_jax`."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("ranks",))

    def step(state: dict[str, jax.Array], *batch: jax.Array) -> tuple:
        return jax_step.train_step(state, *batch, config=config_of(int(state["step"]), num_steps), mesh=mesh)

    return training.run_jax(step, initial_state(), texts.batches(num_steps, BATCH_SIZE, LENGTH, SEED), advance, disturbed_by)


def bits_per_character(parameters: dict[str, torch.Tensor], text: str, draws: int = 4) -> float:
    """How many bits a model needs for a character of a text at most, on average over so many draws of masks; by sequences."""
    config, model = config_of(0, STEPS), partial(sdar.sdar_training, parameters, config=MODEL)
    batch = texts.of_sequences(text, LENGTH)
    dtype, losses = next(iter(parameters.values())).dtype, []
    with torch.no_grad():
        for draw in range(draws):
            weighted = train_block_diffusion.weighted_batch(*batch, STEPS + draw, dtype=dtype, config=config)
            losses.append(train_block_diffusion.weighted_loss(model, *weighted, config=config))
    return float(torch.stack(losses).mean() / math.log(2))


def main(arguments: list[str]) -> int:
    """Trains, draws, writes the model; the exit status says whether the curves agree and the loss fell as stated."""
    parser = argparse.ArgumentParser(description="Train a small SDAR on documents in PyTorch and in JAX from the same draws.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for what is written (default: this one)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # before minutes of training
    runs, allowed = training.in_both(train_torch, train_jax, options.steps)
    return finish(runs, allowed, options.folder, options.steps)


def finish(runs: dict[str, training.Run], allowed: np.ndarray, folder: Path, num_steps: int) -> int:
    """Write what two runs left, say how good it is, and return the exit status."""
    training.draw_losses(runs, allowed, folder / "text_loss.png")
    model = trainer.part_of_state(runs["PyTorch"].state, "model")
    save_file({name: each.half().contiguous() for name, each in model.items()}, folder / "text_model.safetensors")
    is_right = training.report(runs, allowed, STATED_LOSS, num_steps >= STEPS)
    held_out = texts.texts()[1]
    bits = bits_per_character(model, held_out)
    print(f"held-out text: {bits:.2f} bits for a character; {texts.unigram_bits(held_out):.2f} by how often each stands in it")
    print(f"written: {folder / 'text_loss.png'}, {folder / 'text_model.safetensors'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
