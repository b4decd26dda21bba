"""Train a tiny Stable Diffusion on handwritten digits and their names, in PyTorch and in JAX from the same draws.

    python demo/train_stable.py [--steps 1000] [--folder demo]

A UNet learns to take noise from the latents of a VAE, told captions such as "seven"; the CLIP that encodes these, letter by
letter, is trained with it. The VAE is that of `sample_digits.py`, and is not. How far apart the two runs' losses may lie is
measured as by `train_digits.py`. Writes stable.png (samples of both models) and stable_loss.png.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import torch
import training
from digits import NAMES, accuracy, batches, draw_samples
from sample_digits import SCHEDULE, VAE, load

from gaugeblock.optimized.jax import train_stable_diffusion as jax_step
from gaugeblock.reference import states
from gaugeblock.reference.configs import CLIPTextConfig, StableDiffusionConfig, UNetConfig
from gaugeblock.reference.torch import clip_text, samplers, train_stable_diffusion, unet, vae
from gaugeblock.reference.torch import training as trainer

LETTERS = sorted(set("".join(NAMES)))
BEGIN, END = len(LETTERS), len(LETTERS) + 1  # tokens beside the letters; captions are filled up with the latter, as CLIP's are
NUM_TOKENS = 2 + max(map(len, NAMES))
TEXT = CLIPTextConfig(
    vocab_size=END + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=NUM_TOKENS, eos_token_id=END,
)  # fmt: skip
UNET = UNetConfig(
    in_channels=4, out_channels=4, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1, transformer_layers_per_block=(1, 1), attention_head_dim=(2, 2), cross_attention_dim=32, norm_num_groups=4,
)  # fmt: skip
DIGIT_MODELS = load(Path(__file__).parent / "digit_models.safetensors")
RUN = StableDiffusionConfig(
    unet=UNET, text_encoders=(TEXT,), vae=replace(VAE, scaling_factor=DIGIT_MODELS.scale), schedule=SCHEDULE,
    train_text_encoder=True, text_dropout=0.1, snr_gamma=5.0, seed=5, learning_rate=2e-3, max_gradient_norm=1.0,
)  # fmt: skip
BATCH_SIZE = 64
STEPS = 1000
STATED_LOSS = 0.115  # mean over the last tenth of STEPS steps; the first is 0.9
SAMPLES_PER_DIGIT, SAMPLING_STEPS, GUIDANCE_SCALE = 8, 32, 3.0
NO_TEXT = len(NAMES)


def tokens(caption: str) -> list[int]:
    """The ids of a caption: its letters between the beginning and the end."""
    ids = [BEGIN, *map(LETTERS.index, caption)]
    return ids + [END] * (NUM_TOKENS - len(ids))


CAPTIONS = torch.tensor([tokens(name) for name in NAMES])


def of_run(num_steps: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Images, captions' tokens, no numbers, and ids of each step's batch."""
    for images, labels, ids in batches(num_steps, BATCH_SIZE, RUN.seed):
        yield images, CAPTIONS[labels, None], torch.empty(BATCH_SIZE, 0), ids


def frozen() -> dict[str, torch.Tensor]:
    """The VAE's encoder."""
    return {f"vae.{name}": DIGIT_MODELS.vae[name] for name in vae.encoder_shapes(VAE)}


def train_torch(num_steps: int, advance: training.Advance) -> training.Run:
    """Train with the PyTorch reference."""
    fixed, initial = frozen(), train_stable_diffusion.initial_state(RUN)

    def step(state: dict[str, torch.Tensor], *batch: torch.Tensor) -> tuple[dict, train_stable_diffusion.Metrics]:
        return train_stable_diffusion.train_step(state, fixed, *batch, config=RUN)

    return training.run_torch(step, initial, of_run(num_steps), advance)


def train_jax(num_steps: int, advance: training.Advance, disturbed_by: int | None = None) -> training.Run:
    """Train with the jitted JAX step, from the PyTorch reference's initial state; as `training.run_jax`."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("ranks",))
    fixed = {name: training.to_jax(tensor) for name, tensor in frozen().items()}

    def step(state: dict[str, jax.Array], *batch: jax.Array) -> tuple:
        return jax_step.train_step(state, fixed, *batch, config=RUN, mesh=mesh)

    return training.run_jax(step, train_stable_diffusion.initial_state(RUN), of_run(num_steps), advance, disturbed_by)


def sample(run: training.Run) -> np.ndarray:
    """Samples, [10, SAMPLES_PER_DIGIT, 8, 8] in [-1, 1], a row for each name."""
    parameters = trainer.part_of_state(run.state, "model")
    of_unet, of_text = (states.part(parameters, name) for name in ("unet", "text_encoder"))
    labels = torch.arange(len(NAMES)).repeat_interleave(SAMPLES_PER_DIGIT)
    ids = torch.arange(len(labels))
    with torch.no_grad():
        texts, _ = clip_text.clip_text(of_text, CAPTIONS, config=TEXT)
        texts = torch.cat([texts, torch.zeros_like(texts[:1])])

        def predict(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return unet.unet(of_unet, x, timesteps, texts[labels], config=UNET)

        latents = samplers.ddim_sample(
            samplers.guided(predict, labels, null_label=NO_TEXT, guidance_scale=GUIDANCE_SCALE),
            samplers.starting_noise(ids, shape=(4, 4, 4), seed=RUN.seed), ids, config=SCHEDULE, num_steps=SAMPLING_STEPS,
            seed=RUN.seed,
        )  # fmt: skip
        images = vae.decode(DIGIT_MODELS.vae, latents / DIGIT_MODELS.scale, config=VAE)
    return images.clamp(-1, 1).view(len(NAMES), SAMPLES_PER_DIGIT, 8, 8).numpy()


def main(arguments: list[str]) -> int:
    """Trains, samples, draws; the exit status says whether the curves agree and the loss fell as stated."""
    parser = argparse.ArgumentParser(description="Train a tiny Stable Diffusion on digits in PyTorch and in JAX.")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for the pictures (default: this one)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # before minutes of training

    runs, allowed = training.in_both(train_torch, train_jax, options.steps)
    samples = {name: sample(run) for name, run in runs.items()}
    draw_samples(samples, options.folder / "stable.png", rows=NAMES)
    training.draw_losses(runs, allowed, options.folder / "stable_loss.png")
    is_right = training.report(runs, allowed, STATED_LOSS, options.steps >= STEPS)
    for name, images in samples.items():
        right = accuracy(images.reshape(-1, 8, 8), np.arange(10).repeat(SAMPLES_PER_DIGIT))
        print(f"{name}: {right:.0%} of its samples are right")
    print(f"pictures: {options.folder / 'stable.png'}, {options.folder / 'stable_loss.png'}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
