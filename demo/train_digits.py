"""Train a tiny DiT on the handwritten digits that scikit-learn ships, in PyTorch and in JAX from the same draws.

    python demo/train_digits.py [--steps 1500] [--folder demo]

Both runs start from the same state and see the same images, noise, times and dropped labels, so their losses differ by rounding
alone. How fast rounding errors grow is measured: further JAX runs get an error of one rounding in every parameter before every
step, and the spread of their losses is what the two runs may lie apart. Writes digits.png (samples of both models) and loss.png.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch
import training
from digits import accuracy, batches, draw_samples

from gaugeblock.optimized.jax import train_image_diffusion as jax_step
from gaugeblock.reference.configs import DiTConfig, ImageDiffusionConfig
from gaugeblock.reference.torch import dit, samplers, train_image_diffusion
from gaugeblock.reference.torch import training as trainer

MODEL = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=64, depth=3, num_heads=4, num_classes=10, learn_sigma=False
)
RUN = ImageDiffusionConfig(MODEL, seed=7, learning_rate=2e-3, max_gradient_norm=1.0, label_dropout=0.1)
BATCH_SIZE = 64
STEPS = 1500
STATED_LOSS = 0.45  # mean over the last tenth of STEPS steps; the first is 1.7
SAMPLES_PER_DIGIT, SAMPLING_STEPS, GUIDANCE_SCALE = 8, 32, 2.0


def train_torch(num_steps: int, advance: training.Advance) -> training.Run:
    """Train with the PyTorch reference."""
    step = partial(train_image_diffusion.train_step, config=RUN)
    return training.run_torch(step, train_image_diffusion.initial_state(RUN), batches(num_steps, BATCH_SIZE, RUN.seed), advance)


def train_jax(num_steps: int, advance: training.Advance, disturbed_by: int | None = None) -> training.Run:
    """Train with the jitted JAX step, from the PyTorch reference's initial state; as `training.run_jax`."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("ranks",))
    step, initial = partial(jax_step.train_step, config=RUN, mesh=mesh), train_image_diffusion.initial_state(RUN)
    return training.run_jax(step, initial, batches(num_steps, BATCH_SIZE, RUN.seed), advance, disturbed_by)


def sample(run: training.Run) -> np.ndarray:
    """Samples, [10, SAMPLES_PER_DIGIT, 8, 8] in [-1, 1], a row for each digit."""
    labels = torch.arange(10).repeat_interleave(SAMPLES_PER_DIGIT)
    noise = samplers.starting_noise(torch.arange(len(labels)), shape=(1, 8, 8), seed=RUN.seed)
    parameters = trainer.part_of_state(run.state, "model")
    with torch.no_grad():
        images = samplers.euler_sample(
            partial(dit.dit, parameters, config=MODEL), noise, labels, null_label=MODEL.num_classes,
            guidance_scale=GUIDANCE_SCALE, num_steps=SAMPLING_STEPS, velocity=RUN.velocity,
        )  # fmt: skip
    return images.clamp(-1, 1).view(10, SAMPLES_PER_DIGIT, 8, 8).numpy()


def main(arguments: list[str]) -> int:
    """Trains, samples, draws; the exit status says whether the curves agree and the loss fell as stated."""
    parser = argparse.ArgumentParser(description="Train a tiny DiT on digits in PyTorch and in JAX from the same draws.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for the pictures (default: this one)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # before minutes of training

    runs, allowed = training.in_both(train_torch, train_jax, options.steps)
    samples = {name: sample(run) for name, run in runs.items()}
    draw_samples(samples, options.folder / "digits.png")
    training.draw_losses(runs, allowed, options.folder / "loss.png")
    is_right = training.report(runs, allowed, STATED_LOSS, options.steps >= STEPS)
    for name, images in samples.items():
        right = accuracy(images.reshape(-1, 8, 8), np.arange(10).repeat(SAMPLES_PER_DIGIT))
        print(f"{name}: {right:.0%} of its samples are right")
    print(f"pictures: {options.folder / 'digits.png'}, {options.folder / 'loss.png'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
