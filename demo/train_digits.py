"""Train a tiny DiT on the handwritten digits that scikit-learn ships, in PyTorch and in JAX from the same draws.

    python demo/train_digits.py [--steps 1500] [--folder demo]

Both runs start from the same state and see the same images, noise, times and dropped labels, so their losses differ by rounding
alone. How fast rounding errors grow is measured: further JAX runs get an error of one rounding in every parameter after every
step, and the spread of their losses is what the two runs may lie apart. Writes digits.png (samples of both models) and loss.png.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
import torch
import training
from digits import accuracy, batches

from gaugeblock.optimized.jax import train_image_diffusion as jax_step
from gaugeblock.optimized.jax.training import shard_state
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


def train_torch(num_steps: int, advance: Callable[[float], None]) -> training.Run:
    """Train with the PyTorch reference."""
    state, losses = train_image_diffusion.initial_state(RUN), []
    for batch in batches(num_steps, BATCH_SIZE, RUN.seed):
        state, metrics = train_image_diffusion.train_step(state, *batch, config=RUN)
        losses.append(float(metrics.loss))
        advance(losses[-1])
    return training.Run(np.array(losses), state)


def train_jax(num_steps: int, advance: Callable[[float], None], disturbed_by: int | None = None) -> training.Run:
    """Train with the jitted JAX step, from the PyTorch reference's initial state.

    Args:
        disturbed_by: A seed; the parameters get an error of one rounding after every step.
    """
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("ranks",))
    initial = train_image_diffusion.initial_state(RUN)
    state = shard_state({name: training.to_jax(tensor) for name, tensor in initial.items()}, mesh)
    losses = []
    for step, batch in enumerate(batches(num_steps, BATCH_SIZE, RUN.seed)):
        state, metrics = jax_step.train_step(state, *map(training.to_jax, batch), config=RUN, mesh=mesh)
        if disturbed_by is not None:
            state = training.disturb(state, jax.random.fold_in(jax.random.key(disturbed_by), step))
        losses.append(float(metrics.loss))
        advance(losses[-1])
    return training.Run(np.array(losses), {name: torch.from_dlpack(each.copy()) for name, each in state.items()})


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


def draw_samples(torch_samples: np.ndarray, jax_samples: np.ndarray, path: Path) -> None:
    """Write both models' samples side by side."""
    pyplot = training.pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 5))
    for axis, samples, name in zip(axes, (torch_samples, jax_samples), ("PyTorch", "JAX"), strict=True):
        axis.imshow(samples.transpose(0, 2, 1, 3).reshape(80, SAMPLES_PER_DIGIT * 8), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(name)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> int:
    """Trains, samples, draws; the exit status says whether the curves agree and the loss fell as stated."""
    parser = argparse.ArgumentParser(description="Train a tiny DiT on digits in PyTorch and in JAX from the same draws.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for the pictures (default: this one)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # before minutes of training

    runs, allowed = training.in_both(train_torch, train_jax, options.steps)
    samples = {name: sample(run) for name, run in runs.items()}
    draw_samples(samples["PyTorch"], samples["JAX"], options.folder / "digits.png")
    training.draw_losses(runs, allowed, options.folder / "loss.png")
    is_right = training.report(runs, allowed, STATED_LOSS, options.steps >= STEPS)
    for name, images in samples.items():
        right = accuracy(images.reshape(-1, 8, 8), np.arange(10).repeat(SAMPLES_PER_DIGIT))
        print(f"{name}: {right:.0%} of its samples are right")
    print(f"pictures: {options.folder / 'digits.png'}, {options.folder / 'loss.png'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
