"""Train a small SDAR, character by character, on this repository's documents, in PyTorch and in JAX from the same draws.

    python demo/train_text.py [--steps 1500] [--folder demo]

Both runs start from the same parameters and see the same sequences and masks. How far apart their losses may lie is measured as
by `train_digits.py`. Writes text_loss.png, and the PyTorch run's model, in half precision, to text_model.safetensors.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import texts
import torch
import training
from safetensors.torch import save_file

from gaugeblock.reference.configs import SDARConfig, TrainingConfig
from gaugeblock.reference.jax import sdar as jax_sdar
from gaugeblock.reference.jax import training as jax_trainer
from gaugeblock.reference.torch import sdar
from gaugeblock.reference.torch import training as trainer

MODEL = SDARConfig(
    vocab_size=texts.MASK_ID + 1, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-6, rope_theta=1e4, mask_token_id=texts.MASK_ID, block_length=4,
)  # fmt: skip
SEED, BATCH_SIZE, LENGTH, STEPS = 3, 16, 64, 1500
OPTIMIZER = TrainingConfig(learning_rate=3e-3, beta2=0.99, weight_decay=0.01)
STATED_LOSS = 1.95  # nats for each character: the mean over the last tenth of STEPS steps; the first is 4.8


def optimizer(step: int, num_steps: int) -> TrainingConfig:
    """The learning rate is raised and lowered in few stages, since JAX compiles the update for each."""
    stages = ((0.02, 0.2), (0.6, 1.0), (0.85, 0.3), (1.0, 0.1))
    factor = next(factor for end, factor in stages if step < end * num_steps or end == 1.0)
    return replace(OPTIMIZER, learning_rate=OPTIMIZER.learning_rate * factor)


def batches(num_steps: int) -> Iterator[texts.Batch]:
    """Of this run."""
    return texts.batches(num_steps, BATCH_SIZE, LENGTH, MODEL.block_length, SEED)


def initial_state() -> dict[str, torch.Tensor]:
    """New parameters, moments of 0, step 0."""
    parameters = training.initial_parameters(sdar.state_shapes(MODEL), SEED)
    return trainer.initial_state(parameters, config=OPTIMIZER)


def loss_of(parameters: dict, noisy: torch.Tensor, clean: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted cross-entropies of masked characters, over the number of all of them."""
    logits_BSV = sdar.sdar_training(parameters, noisy, clean, torch.zeros_like(clean), config=MODEL)
    losses_BS = torch.nn.functional.cross_entropy(logits_BSV.mT, clean, reduction="none")
    return (losses_BS * weights).mean()


def shares(parameters: dict, *batch: torch.Tensor, **_: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of the whole batch, which is one microbatch."""
    loss = loss_of(parameters, *batch)
    return loss, {"loss": loss}


def jax_loss_of(parameters: dict, noisy: jax.Array, clean: jax.Array, weights: jax.Array) -> jax.Array:
    """As `loss_of`."""
    logits_BSV = jax_sdar.sdar_training(parameters, noisy, clean, jnp.zeros_like(clean), config=MODEL)
    own_BS = jnp.take_along_axis(logits_BSV, clean[..., None], axis=-1)[..., 0]
    return ((jax.nn.logsumexp(logits_BSV, axis=-1) - own_BS) * weights).mean()


def train_torch(num_steps: int, advance: Callable[[float], None]) -> training.Run:
    """Train with the PyTorch reference."""
    state, losses = initial_state(), []
    for step, batch in enumerate(batches(num_steps)):
        state, metrics = trainer.step(shares, state, batch, config=optimizer(step, num_steps))
        losses.append(float(metrics["loss"]))
        advance(losses[-1])
    return training.Run(np.array(losses), state)


@partial(jax.jit, static_argnames="config")
def jax_step(
    state: dict, noisy: jax.Array, clean: jax.Array, weights: jax.Array, *, config: TrainingConfig
) -> tuple[dict, jax.Array]:
    """One update, and the loss before it."""
    parameters = jax_trainer.part_of_state(state, "model")
    loss, gradients = jax.value_and_grad(jax_loss_of)(parameters, noisy, clean, weights)
    return jax_trainer.update(state, gradients, jax_trainer.global_norm(gradients), config=config), loss


def train_jax(num_steps: int, advance: Callable[[float], None], disturbed_by: int | None = None) -> training.Run:
    """Train with the JAX reference, compiled, from the same parameters."""
    state, losses = {name: training.to_jax(each) for name, each in initial_state().items()}, []
    for step, batch in enumerate(batches(num_steps)):
        state, loss = jax_step(state, *map(training.to_jax, batch), config=optimizer(step, num_steps))
        if disturbed_by is not None:
            state = training.disturb(state, jax.random.fold_in(jax.random.key(disturbed_by), step))
        losses.append(float(loss))
        advance(losses[-1])
    return training.Run(np.array(losses), {name: torch.from_numpy(np.array(each)) for name, each in state.items()})


def bits_per_character(parameters: dict[str, torch.Tensor], text: str, draws: int = 4) -> float:
    """How many bits a model needs for a character of a text at most, on average over so many draws of masks; by sequences."""
    ids = texts.encode(text)
    clean = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.no_grad():
        masked = (texts.masked(clean, MODEL.block_length, seed=SEED, step=STEPS + draw) for draw in range(draws))
        losses = [loss_of(parameters, *each) for each in masked]
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
