"""Make a mixture of experts of a small GPT-2 and train it, character by character, on this repository's documents.

    python demo/train_moe_lm.py [--steps 1000] [--folder demo]

A dense GPT-2 is trained first, in PyTorch. Then the MLPs of its last layers are copied into experts, and this model is trained in
PyTorch and in JAX from the same state and draws: the loss begins where the dense one's ended. How far apart the two runs' losses
may lie is measured as by `train_digits.py`, but for choices: of thousands in a step, each run once has one whose best two scores
are as good as equal, and from there on two runs differ by what a choice is worth. Writes moe_lm_loss.png, and moe_lm_load.png:
how much each expert had to do.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import texts
import torch
import training

from gaugeblock.optimized.jax import train_moe_lm as jax_step
from gaugeblock.reference.configs import MoELMConfig, UpcycledGPT2Config
from gaugeblock.reference.torch import data_order, random, train_moe_lm, upcycled_gpt2
from gaugeblock.reference.torch import training as trainer

LENGTH, BATCH_SIZE, STEPS, DENSE_STEPS = 64, 16, 1000, 500
MODEL = UpcycledGPT2Config(
    vocab_size=len(texts.ALPHABET), hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    max_position_embeddings=LENGTH, moe_layers=(2, 3), num_experts=4,
)  # fmt: skip
RUN = MoELMConfig(
    MODEL, seed=13, learning_rate=3e-3, beta2=0.99, weight_decay=0.01, learning_rate_schedule="cosine", num_warmup_steps=10,
    num_training_steps=STEPS,
)  # fmt: skip
DENSE = replace(RUN, model=replace(MODEL, moe_layers=()), num_training_steps=2 * DENSE_STEPS)  # which ends where it is warm
STATED_LOSS = 1.95  # nats for each character: the mean over the last tenth of STEPS steps; the first is 2.6
MOST_TIES = 2  # choices of a step that rounding decides
PROMPT, SAMPLES, SAMPLED, TEMPERATURE = "RoundingNoise ", 4, 160, 0.7


def batches(num_steps: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, labels that are the same, and ids of each step's sequences: all of the text again and again, in another order."""
    ids = texts.encode(texts.texts()[0])
    sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    for step in range(first, first + num_steps):
        chosen = data_order.batch_ids(step, batch_size=BATCH_SIZE, num_examples=len(sequences), seed=RUN.seed)
        yield sequences[chosen], sequences[chosen], chosen


@cache
def dense_run(num_steps: int) -> training.Run:
    """A dense model, trained with the PyTorch reference."""
    parameters = training.initial_parameters(upcycled_gpt2.state_shapes(DENSE.model), RUN.seed)
    state = train_moe_lm.initial_state(parameters, config=DENSE)
    return training.run_torch(partial(step_of_torch, [], DENSE), state, batches(num_steps), lambda loss: None)


def initial_state(num_steps: int) -> dict[str, torch.Tensor]:
    """Of the run with experts: copies of the dense model's MLPs, each with little noise of its own."""
    dense = trainer.part_of_state(dense_run(max(1, num_steps * DENSE_STEPS // STEPS)).state, "model")
    return train_moe_lm.initial_state(upcycled_gpt2.upcycled_state(dense, config=MODEL, seed=RUN.seed), config=RUN)


def step_of_torch(loads: list[np.ndarray], config: MoELMConfig, state: dict[str, torch.Tensor], *batch: torch.Tensor) -> tuple:
    """One update with the PyTorch reference; notes each expert's load."""
    state, metrics = train_moe_lm.train_step(state, *batch, config=config)
    loads.append(metrics.load.numpy())
    return state, SimpleNamespace(loss=metrics.lm_loss)


def first_other_choice(loads: np.ndarray, others: np.ndarray) -> tuple[int, int]:
    """In which step two runs first differ in a choice, or how many there are, and how many choices are other ones there.

    Args:
        loads, others: [num_steps, layers, experts], parts of all assignments.
    """
    moved = np.rint(np.abs(loads - others) * BATCH_SIZE * LENGTH).sum(axis=(1, 2)) / 2
    first = int(np.argmax(moved > 0)) if moved.any() else len(moved)
    return first, int(moved[first]) if moved.any() else 0


def train_torch(loads: list[np.ndarray], num_steps: int, advance: training.Advance) -> training.Run:
    """Train with the PyTorch reference."""
    step = partial(step_of_torch, loads, RUN)
    return training.run_torch(step, initial_state(num_steps), batches(num_steps, DENSE_STEPS), advance)


def train_jax(
    loads: list[np.ndarray], num_steps: int, advance: training.Advance, disturbed_by: int | None = None
) -> training.Run:
    """Train with the jitted JAX step, from the same state; as `training.run_jax`."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("ranks",))

    def step(state: dict[str, jax.Array], *batch: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        state, metrics = jax_step.train_step(state, *batch, config=RUN, mesh=mesh)
        loads.append(np.asarray(metrics.load))
        return state, SimpleNamespace(loss=metrics.lm_loss)

    return training.run_jax(step, initial_state(num_steps), batches(num_steps, DENSE_STEPS), advance, disturbed_by)


@torch.no_grad()
def sample(parameters: dict[str, torch.Tensor]) -> list[str]:
    """What the model writes after the prompt, a character at a time."""
    ids = texts.encode(PROMPT).repeat(SAMPLES, 1)
    for place in range(SAMPLED):
        seen = ids[:, -LENGTH:]
        noise = torch.zeros(*seen.shape, len(MODEL.moe_layers), MODEL.num_experts)
        logits_BV = upcycled_gpt2.upcycled_gpt2(parameters, seen, noise, training=False, config=MODEL)[0][:, -1]
        drawn = random.uniform(
            (MODEL.vocab_size,), seed=RUN.seed, step=place, example=torch.arange(SAMPLES), purpose=training.SAMPLES
        )
        scores = logits_BV / TEMPERATURE - torch.log(-torch.log(drawn.clamp(1e-7, 1 - 1e-7)))  # a draw of the softmax
        ids = torch.cat([ids, scores.argmax(dim=1, keepdim=True)], dim=1)
    return [texts.decode(each) for each in ids]


@torch.no_grad()
def held_out_bits(parameters: dict[str, torch.Tensor]) -> float:
    """Bits for a character of held-out text, of those that have others before them in a sequence."""
    ids = texts.encode(texts.texts()[1])
    clean = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    noise = torch.zeros(*clean.shape, len(MODEL.moe_layers), MODEL.num_experts)
    logits = upcycled_gpt2.upcycled_gpt2(parameters, clean, noise, training=False, config=MODEL)[0]
    return float(train_moe_lm.token_losses(logits, clean).mean() / math.log(2))


def draw_loads(loads: np.ndarray, path: Path) -> None:
    """Write each expert's part of all assignments, [num_steps, layers, experts], averaged over some steps."""
    plots = training.pyplot()
    window = max(1, len(loads) // 50)
    means = loads[: len(loads) // window * window].reshape(-1, window, *loads.shape[1:]).mean(axis=1)
    figure, axes = plots.subplots(1, loads.shape[1], figsize=(8, 3), sharey=True)
    for axis, layer, of_layer in zip(axes, MODEL.moe_layers, means.swapaxes(0, 1), strict=True):
        axis.stackplot(window * np.arange(len(of_layer)), of_layer.T, labels=[f"expert {e}" for e in range(MODEL.num_experts)])
        axis.set_title(f"layer {layer}")
        axis.set_xlabel("step")
    axes[0].set_ylabel("part of the tokens")
    axes[-1].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> int:
    """Trains, draws, samples; the exit status says whether the curves agree and the loss fell as stated."""
    parser = argparse.ArgumentParser(description="Train an upcycled GPT-2 on documents in PyTorch and in JAX.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run with experts (default: {STEPS})")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for the pictures (default: this one)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # before minutes of training

    loads: list[np.ndarray] = []
    of_jax: list[np.ndarray] = []
    dense = dense_run(max(1, options.steps * DENSE_STEPS // STEPS)).losses
    print(f"dense: loss {dense[0]:.4f} at first, {dense[-10:].mean():.4f} at last")
    runs, allowed = training.in_both(
        partial(train_torch, loads), partial(train_jax, of_jax), options.steps, num_terms=BATCH_SIZE * (LENGTH - 1)
    )
    first, ties = first_other_choice(np.stack(loads), np.stack(of_jax[: options.steps]))
    of_a_step = MODEL.top_k * len(MODEL.moe_layers) * BATCH_SIZE * LENGTH
    print(f"choices: the same in the first {first} steps, then {ties} of {of_a_step} are other ones")
    allowed[first:] = allowed.max()
    training.draw_losses(runs, allowed, options.folder / "moe_lm_loss.png")
    draw_loads(np.stack(loads), options.folder / "moe_lm_load.png")
    is_right = training.report(runs, allowed, STATED_LOSS, options.steps >= STEPS) and ties <= MOST_TIES
    parameters = trainer.part_of_state(runs["PyTorch"].state, "model")
    least, most = np.stack(loads[-max(1, len(loads) // 10) :]).mean(axis=0).min(), np.stack(loads).max()
    print(f"experts: the least has {least:.0%} of its layer's tokens in the last tenth, the most ever is {most:.0%}")
    samples = sample(parameters)
    print(
        f"held-out text: {held_out_bits(parameters):.2f} bits for a character; {texts.likeness(samples)[0]:.0%} words of samples"
    )
    print(f"sample: {samples[0]!r}")
    print(f"pictures: {options.folder / 'moe_lm_loss.png'}, {options.folder / 'moe_lm_load.png'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
