"""Train a tiny text-latent MMDiT, in both directions and in cycles, on this repository's documents and what encodes them.

    python demo/train_cycle.py [--steps 1000] [--folder demo]

Texts are of 16 characters. What encodes them is trained first: the principal components of how often each character stands in a
text, scaled to a variance of 1. The model learns to predict a text from its latent, the noise of a noised latent from its text,
and both through the other. It is trained in PyTorch and in JAX from the same draws; how far apart the two runs' losses may lie is
measured as by `train_digits.py`. Writes cycle_loss.png, and says how much of held-out texts their latents tell.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import texts
import torch
import training
from sklearn.decomposition import PCA

from gaugeblock.optimized.jax import train_cycle_vae as jax_step
from gaugeblock.reference.configs import CycleVAEConfig, TextLatentMMDiTConfig
from gaugeblock.reference.torch import data_order, text_latent_mmdit, train_cycle_vae
from gaugeblock.reference.torch import training as trainer

LENGTH, BATCH_SIZE, STEPS, FITTED_ON = 16, 32, 1000, 4000
MODEL = TextLatentMMDiTConfig(
    vocab_size=texts.MASK_ID + 1, latent_dim=32, hidden_size=64, n_blocks=2, cond_dim=64, max_seq_len=LENGTH
)
RUN = CycleVAEConfig(
    model=MODEL, mask_token_id=texts.MASK_ID, seed=17, learning_rate=2e-3, beta2=0.95, weight_decay=0.01,
    learning_rate_schedule="cosine", num_warmup_steps=10, num_training_steps=STEPS, latent_loss_weight=1.0,
    cycle_text_warmup_steps=STEPS // 2, cycle_text_ramp_steps=STEPS // 4,
    cycle_latent_warmup_steps=STEPS // 2, cycle_latent_ramp_steps=STEPS // 4,
)  # fmt: skip
STATED_LOSS = 2.8  # with both cycles: the mean over the last tenth of STEPS steps; the first is 4.6, the last without them 2.5


def sequences(text: str) -> torch.Tensor:
    """The ids of a text's sequences, [N, LENGTH]."""
    ids = texts.encode(text)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def counts(ids: torch.Tensor) -> np.ndarray:
    """How often each character stands in each sequence, [N, characters]."""
    return torch.nn.functional.one_hot(ids, len(texts.ALPHABET)).sum(dim=1).numpy().astype(np.float32)


@cache
def encoder() -> PCA:
    """What makes latents of texts, trained on some of them."""
    own = sequences(texts.texts()[0])
    chosen = data_order.batch_ids(0, batch_size=FITTED_ON, num_examples=len(own), seed=RUN.seed)
    return PCA(MODEL.latent_dim, whiten=True, random_state=0).fit(counts(own[chosen]))


def encode(ids: torch.Tensor) -> torch.Tensor:
    """The latents of sequences, [N, latent_dim] float32."""
    return torch.from_numpy(encoder().transform(counts(ids)).astype(np.float32))


def batches(num_steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, latents, no padding, and ids of each step's sequences: all of the text again and again, in another order."""
    ids = sequences(texts.texts()[0])
    for step in range(num_steps):
        chosen = data_order.batch_ids(step, batch_size=BATCH_SIZE, num_examples=len(ids), seed=RUN.seed)
        yield ids[chosen], encode(ids[chosen]), torch.ones(BATCH_SIZE, LENGTH, dtype=torch.bool), chosen


def train_torch(num_steps: int, advance: training.Advance) -> training.Run:
    """Train with the PyTorch reference."""
    step = partial(train_cycle_vae.train_step, config=RUN)
    return training.run_torch(step, train_cycle_vae.initial_state(RUN), batches(num_steps), advance)


def train_jax(num_steps: int, advance: training.Advance, disturbed_by: int | None = None) -> training.Run:
    """Train with the jitted JAX step, from the PyTorch reference's initial state; as `training.run_jax`."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("ranks",))
    step, initial = partial(jax_step.train_step, config=RUN, mesh=mesh), train_cycle_vae.initial_state(RUN)
    return training.run_jax(step, initial, batches(num_steps), advance, disturbed_by)


@torch.no_grad()
def held_out_bits(parameters: dict[str, torch.Tensor], ids: torch.Tensor) -> float:
    """Bits for a character of texts that are predicted from their latents."""
    masks, nothing = torch.full_like(ids, texts.MASK_ID), torch.zeros(len(ids))
    logits, _, _ = text_latent_mmdit.text_latent_mmdit(
        parameters, masks, encode(ids), torch.ones_like(nothing), nothing, None, config=MODEL
    )
    return float(train_cycle_vae.text_losses(logits, ids).mean() / math.log(2))


def main(arguments: list[str]) -> int:
    """Trains, draws; the exit status says whether the curves agree and the loss fell as stated."""
    parser = argparse.ArgumentParser(description="Train a text-latent MMDiT in cycles in PyTorch and in JAX.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for the picture (default: this one)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # before minutes of training

    runs, allowed = training.in_both(train_torch, train_jax, options.steps)
    training.draw_losses(runs, allowed, options.folder / "cycle_loss.png")
    is_right = training.report(runs, allowed, STATED_LOSS, options.steps >= STEPS)
    held_out = texts.texts()[1]
    for name, run in runs.items():
        bits = held_out_bits(trainer.part_of_state(run.state, "model"), sequences(held_out))
        print(
            f"{name}: {bits:.2f} bits for a held-out character, told the latent; {texts.unigram_bits(held_out):.2f} by frequency"
        )
    print(f"picture: {options.folder / 'cycle_loss.png'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
