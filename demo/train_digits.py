"""Train a tiny DiT on the handwritten digits that scikit-learn ships, in PyTorch and in JAX from the same draws.

    python demo/train_digits.py [--steps 1500] [--folder demo]

Both runs start from the same state and see the same images, noise, times and dropped labels, so their losses differ by rounding
alone. How fast rounding errors grow is measured: further JAX runs get an error of one rounding in every parameter after every
step, and the spread of their losses is what the two runs may lie apart. Writes digits.png (samples of both models) and loss.png.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from digits import accuracy, batches
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gaugeblock.conformance.engine.budget.error_budget import KAPPA
from gaugeblock.conformance.engine.budget.rounding_noise import rounding_unit
from gaugeblock.optimized.jax import train_image_diffusion as jax_step
from gaugeblock.reference.configs import DiTConfig, ImageDiffusionConfig
from gaugeblock.reference.torch import dit, samplers, train_image_diffusion, training

MODEL = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=64, depth=3, num_heads=4, num_classes=10, learn_sigma=False
)
RUN = ImageDiffusionConfig(MODEL, seed=7, learning_rate=2e-3, max_gradient_norm=1.0, label_dropout=0.1)
BATCH_SIZE = 64
STEPS = 1500
STATED_LOSS = 0.45  # mean over the last tenth of STEPS steps; the first is 1.7
GROWTH_RUNS = 2
SAMPLES_PER_DIGIT, SAMPLING_STEPS, GUIDANCE_SCALE = 8, 32, 2.0


@dataclass(frozen=True)
class Run:
    """What a training run leaves.

    Attributes:
        losses: [num_steps].
        state: Its last state.
    """

    losses: np.ndarray
    state: dict[str, torch.Tensor]


def train_torch(num_steps: int, advance: Callable[[float], None]) -> Run:
    """Train with the PyTorch reference."""
    state, losses = train_image_diffusion.initial_state(RUN), []
    for batch in batches(num_steps, BATCH_SIZE, RUN.seed):
        state, metrics = train_image_diffusion.train_step(state, *batch, config=RUN)
        losses.append(float(metrics.loss))
        advance(losses[-1])
    return Run(np.array(losses), state)


def train_jax(num_steps: int, advance: Callable[[float], None], disturbed_by: int | None = None) -> Run:
    """Train with the jitted JAX step, from the PyTorch reference's initial state.

    Args:
        disturbed_by: A seed; the parameters get an error of one rounding after every step.
    """
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("ranks",))
    initial = train_image_diffusion.initial_state(RUN)
    state = jax_step.shard_state({name: to_jax(tensor) for name, tensor in initial.items()}, mesh)
    losses = []
    for step, batch in enumerate(batches(num_steps, BATCH_SIZE, RUN.seed)):
        state, metrics = jax_step.train_step(state, *map(to_jax, batch), config=RUN, mesh=mesh)
        if disturbed_by is not None:
            state = disturb(state, jax.random.fold_in(jax.random.key(disturbed_by), step))
        losses.append(float(metrics.loss))
        advance(losses[-1])
    return Run(np.array(losses), {name: torch.from_dlpack(each.copy()) for name, each in state.items()})


@jax.jit
def disturb(state: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """Return the state with parameters off by as much as rounding them once may."""
    unit = rounding_unit("float32")
    keys = jax.random.split(key, len(state))
    return {
        name: array * (1 + jax.random.uniform(key, array.shape, minval=-unit, maxval=unit)) if "model." in name else array
        for (name, array), key in zip(state.items(), keys, strict=True)
    }


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """The same values in JAX, whose integers are int32."""
    return jnp.asarray(tensor.numpy())


def growth(base: Run, disturbed: list[Run]) -> np.ndarray:
    """How far apart two runs may lie at each step, [num_steps]: as often as in a budget, the spread of the disturbed runs.

    A step's spread is taken over all steps up to it: errors grow, and few runs see little of them by chance. And a loss is
    itself rounded.
    """
    spread = np.stack([each.losses - base.losses for each in disturbed])
    return KAPPA * (np.maximum.accumulate(np.sqrt((spread**2).mean(0))) + rounding_unit("float32") * base.losses)


def sample(run: Run) -> np.ndarray:
    """Samples, [10, SAMPLES_PER_DIGIT, 8, 8] in [-1, 1], a row for each digit."""
    labels = torch.arange(10).repeat_interleave(SAMPLES_PER_DIGIT)
    noise = samplers.starting_noise(torch.arange(len(labels)), shape=(1, 8, 8), seed=RUN.seed)
    parameters = training.part_of_state(run.state, "model")
    with torch.no_grad():
        images = samplers.euler_sample(
            partial(dit.dit, parameters, config=MODEL), noise, labels, null_label=MODEL.num_classes,
            guidance_scale=GUIDANCE_SCALE, num_steps=SAMPLING_STEPS, velocity=RUN.velocity,
        )  # fmt: skip
    return images.clamp(-1, 1).view(10, SAMPLES_PER_DIGIT, 8, 8).numpy()


def draw_samples(torch_samples: np.ndarray, jax_samples: np.ndarray, path: Path) -> None:
    """Write both models' samples side by side."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 5))
    for axis, samples, name in zip(axes, (torch_samples, jax_samples), ("PyTorch", "JAX"), strict=True):
        axis.imshow(samples.transpose(0, 2, 1, 3).reshape(80, SAMPLES_PER_DIGIT * 8), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(name)
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def draw_losses(torch_run: Run, jax_run: Run, allowed: np.ndarray, path: Path) -> None:
    """Write the loss curves, and below them how far they lie apart and may."""
    pyplot = _pyplot()
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True)
    above.plot(torch_run.losses, label="PyTorch", linewidth=2, alpha=0.6)
    above.plot(jax_run.losses, label="JAX", linewidth=0.7)
    above.set_ylabel("loss")
    below.semilogy(np.abs(torch_run.losses - jax_run.losses) + 1e-9, label="difference", linewidth=0.7)
    below.semilogy(allowed, label="allowed: the growth of rounding errors")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> int:
    """Trains, samples, draws; the exit status says whether the curves agree and the loss fell as stated."""
    parser = argparse.ArgumentParser(description="Train a tiny DiT on digits in PyTorch and in JAX from the same draws.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for the pictures (default: this one)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # before minutes of training

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:

        def run(name: str, train: Callable[..., Run], **how: Any) -> Run:
            task = progress.add_task(name, total=options.steps, loss=float("nan"))
            return train(options.steps, lambda loss: progress.update(task, advance=1, loss=loss), **how)

        torch_run, jax_run = run("PyTorch", train_torch), run("JAX", train_jax)
        disturbed = [run(f"JAX, disturbed {seed + 1}", train_jax, disturbed_by=seed) for seed in range(GROWTH_RUNS)]

    allowed = growth(jax_run, disturbed)
    apart = np.abs(torch_run.losses - jax_run.losses)
    last = max(1, options.steps // 10)
    final = {"PyTorch": torch_run.losses[-last:].mean(), "JAX": jax_run.losses[-last:].mean()}
    samples = {"PyTorch": sample(torch_run), "JAX": sample(jax_run)}
    draw_samples(samples["PyTorch"], samples["JAX"], options.folder / "digits.png")
    draw_losses(torch_run, jax_run, allowed, options.folder / "loss.png")

    agree, fell = bool((apart <= allowed).all()), all(each <= STATED_LOSS for each in final.values())
    for name, loss in final.items():
        right = accuracy(samples[name].reshape(-1, 8, 8), np.arange(10).repeat(SAMPLES_PER_DIGIT))
        print(f"{name}: final loss {loss:.4f} (stated: at most {STATED_LOSS}); {right:.0%} of its samples are right")
    print(f"curves: {'within' if agree else 'BEYOND'} the growth of rounding errors, at most {(apart / allowed).max():.2f} of it")
    print(f"pictures: {options.folder / 'digits.png'}, {options.folder / 'loss.png'}")
    return 0 if agree and (fell or options.steps < STEPS) else 1


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
