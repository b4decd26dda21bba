"""What the demo's training runs share: initial parameters, how far apart two runs may lie, and the picture of their losses."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gaugeblock.conformance.engine.budget.error_budget import KAPPA
from gaugeblock.conformance.engine.budget.rounding_noise import rounding_unit
from gaugeblock.reference.torch import random

INITIAL = 2**32 - 2  # the purpose of draws of initial parameters, which no trainer has
SAMPLES = 2**32 - 9  # that of what is sampled
GROWTH_RUNS = 2

Step = Callable[..., tuple[Any, Any]]
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Run:
    """What a training run leaves.

    Attributes:
        losses: [num_steps].
        state: Its last state.
    """

    losses: np.ndarray
    state: dict[str, torch.Tensor]


def initial_parameters(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Weights are uniform, of variance 1 / (3 fan-in); norms begin as such, and the last convolution at 0."""
    state = {}
    for place, (name, shape) in enumerate(shapes.items()):
        if len(shape) == 1:
            state[name] = torch.full(shape, float("norm" in name and name.endswith("weight")))
        else:
            bound = 0.0 if name == "conv_out.weight" else math.prod(shape[1:]) ** -0.5
            drawn = random.uniform(shape, seed=seed, step=0, example=place, purpose=INITIAL)
            state[name] = bound * (2 * drawn - 1)
    return state


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """The same values in JAX, whose integers are int32."""
    return jnp.asarray(tensor.numpy())


def disturb(state: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """Return the state with parameters off by as much as rounding them once may."""
    keys = jax.random.split(key, len(state))
    return {
        name: rounded_once(array, key) if "model." in name else array
        for (name, array), key in zip(state.items(), keys, strict=True)
    }


@jax.jit  # of one array: XLA takes minutes for all of a model at once
def rounded_once(array: jax.Array, key: jax.Array) -> jax.Array:
    """Return an array each of whose elements is off by as much as rounding it once may."""
    unit = rounding_unit("float32")
    return array * (1 + jax.random.uniform(key, array.shape, minval=-unit, maxval=unit))


def run_torch(step: Step, state: Mapping[str, torch.Tensor], batches: Iterable[Any], advance: Advance) -> Run:
    """Take a step on each batch; it returns the state after it, and metrics with a loss."""
    losses = []
    for batch in batches:
        state, metrics = step(state, *batch)
        losses.append(float(metrics.loss))
        advance(losses[-1])
    return Run(np.array(losses), dict(state))


def run_jax(
    step: Step, state: Mapping[str, torch.Tensor], batches: Iterable[Any], advance: Advance, disturbed_by: int | None = None
) -> Run:
    """As `run_torch`, from the same state, with a step in JAX.

    Args:
        disturbed_by: A seed; the parameters get an error of one rounding before every step.
    """
    arrays, losses = {name: to_jax(tensor) for name, tensor in state.items()}, []
    for number, batch in enumerate(batches):
        if disturbed_by is not None:
            arrays = disturb(arrays, jax.random.fold_in(jax.random.key(disturbed_by), number))
        arrays, metrics = step(arrays, *map(to_jax, batch))
        losses.append(float(metrics.loss))
        advance(losses[-1])
    return Run(np.array(losses), {name: torch.from_dlpack(each.copy()) for name, each in arrays.items()})


def growth(base: Run, disturbed: list[Run], num_terms: int = 1) -> np.ndarray:
    """How far apart two runs may lie at each step, [num_steps]: as often as in a budget, the spread of the disturbed runs.

    A step's spread is taken over all steps up to it: errors grow, and few runs see little of them by chance. And a loss is
    itself rounded: a mean of `num_terms` losses that are added one after the other, the k-th sum of n off by up to k / n of a
    rounding of all, by the square root of n, over 3, in the mean square. (Of 1008 that is 10.6 roundings; against float64, the
    compiled step is off by 4.8 in the mean square and 10.7 at most, PyTorch, which adds in pairs, by 1.3.)
    """
    own = max(1.0, math.sqrt(num_terms) / 3) * rounding_unit("float32")
    spread = np.stack([each.losses - base.losses for each in disturbed])
    return KAPPA * (np.maximum.accumulate(np.sqrt((spread**2).mean(0))) + own * base.losses)


def in_both(
    train_torch: Callable[..., Run], train_jax: Callable[..., Run], num_steps: int, num_terms: int = 1
) -> tuple[dict[str, Run], np.ndarray]:
    """Train in PyTorch and in JAX, and in JAX again with errors, and show how far it is.

    Args:
        train_torch, train_jax: From a number of steps and a function that is called with each step's loss. The second one's
            `disturbed_by` is a seed; its parameters then get an error of one rounding before every step.

        num_terms: How many losses a step's is the mean of, where they are added one after the other.

    Returns:
        runs: By the framework's name.
        allowed: [num_steps], how far apart their losses may lie.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:

        def run(name: str, train: Callable[..., Run], **how: Any) -> Run:
            task = progress.add_task(name, total=num_steps, loss=float("nan"))
            return train(num_steps, lambda loss: progress.update(task, advance=1, loss=loss), **how)

        runs = {"PyTorch": run("PyTorch", train_torch), "JAX": run("JAX", train_jax)}
        disturbed = [run(f"JAX, disturbed {seed + 1}", train_jax, disturbed_by=seed) for seed in range(GROWTH_RUNS)]
    return runs, growth(runs["JAX"], disturbed, num_terms)


def report(runs: Mapping[str, Run], allowed: np.ndarray, stated_loss: float, is_whole: bool) -> bool:
    """Print how far the losses fell and how far apart they lie, and return whether both is as stated.

    Args:
        stated_loss: The most that the mean over the last tenth of the steps may be, where the run is a whole one.
    """
    last = max(1, len(allowed) // 10)
    final = {name: float(run.losses[-last:].mean()) for name, run in runs.items()}
    for name, loss in final.items():
        print(f"{name}: final loss {loss:.4f} (stated: at most {stated_loss})")
    apart = np.abs(runs["PyTorch"].losses - runs["JAX"].losses)
    agree, fell = bool((apart <= allowed).all()), all(each <= stated_loss for each in final.values())
    print(f"curves: {'within' if agree else 'BEYOND'} the growth of rounding errors, at most {(apart / allowed).max():.2f} of it")
    return agree and (fell or not is_whole)


def draw_losses(runs: Mapping[str, Run], allowed: np.ndarray, path: Path) -> None:
    """Write the loss curves, and below them how far they lie apart and may."""
    plots = pyplot()
    figure, (above, below) = plots.subplots(2, 1, figsize=(8, 6), sharex=True)
    above.plot(runs["PyTorch"].losses, label="PyTorch", linewidth=2, alpha=0.6)
    above.plot(runs["JAX"].losses, label="JAX", linewidth=0.7)
    above.set_ylabel("loss")
    below.semilogy(np.abs(runs["PyTorch"].losses - runs["JAX"].losses) + 1e-9, label="difference", linewidth=0.7)
    below.semilogy(allowed, label="allowed: the growth of rounding errors")
    below.set_xlabel("step")
    for axis in (above, below):
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def pyplot() -> Any:
    """matplotlib, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
