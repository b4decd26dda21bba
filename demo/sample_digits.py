"""Train the tiny DiT of train_digits.py, and sample it with every sampler: one model, whatever its samplers ask for.

    python demo/sample_digits.py [--steps 1500] [--folder demo]

The model predicts a flow's velocity. A sampler of another diffusion shows it an example with as much noise per data, scaled to
the flow's, and gets the prediction that it wants, converted. Writes a picture, a row for each sampler, and says how far the
mean and the deviation of its pixels lie from those of the digits.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import train_digits
from train_digits import MODEL, RUN, SAMPLES_PER_DIGIT, digits

from gaugeblock.reference.configs import DiffusionScheduleConfig, EDMScheduleConfig, FlowScheduleConfig, PredictionType
from gaugeblock.reference.torch import dit, noise_schedules, predictions, samplers, train_image_diffusion

NUM_STEPS = 24
GUIDANCE_SCALE = 1.5
SEED = 11
LARGEST_MEAN_ERROR, LARGEST_DEVIATION_ERROR = 0.05, 0.1  # of pixels in [-1, 1]; 0.024 and 0.051 after 300 steps of training
Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Statistics:
    """Of the pixels of many images, in [-1, 1]."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, images: torch.Tensor) -> "Statistics":
        """Measured."""
        return cls(float(images.mean()), float(images.std()))


def velocity_of(state: dict[str, torch.Tensor], labels: torch.Tensor) -> Flow:
    """The trained model, guided to its labels; of x and times in [0, 1]."""
    parameters = train_image_diffusion.part_of_state(state, "model")
    model = partial(dit.dit, parameters, config=MODEL)
    guided = samplers.guided(model, labels, null_label=MODEL.num_classes, guidance_scale=GUIDANCE_SCALE)
    return lambda x, times: guided(x, 1000 * times)


def predict(flow: Flow, x: torch.Tensor, alphas: torch.Tensor, sigmas: torch.Tensor, to: PredictionType) -> torch.Tensor:
    """What the flow's model says of x = alpha * data + sigma * noise: x / (alpha + sigma) lies on the flow's line."""
    both = alphas + sigmas
    velocity = flow(x / both.view(-1, 1, 1, 1), sigmas / both)
    on_the_line = predictions.convert_prediction(
        velocity, x / both.view(-1, 1, 1, 1), alphas / both, sigmas / both, prediction_type="flow_prediction", to="sample"
    )
    return predictions.convert_prediction(on_the_line, x, alphas, sigmas, prediction_type="sample", to=to)


def all_samples(flow: Flow, noise: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Samples of every sampler, by its name."""
    config = DiffusionScheduleConfig(timestep_spacing="trailing", clip_sample=True)
    table, edm = noise_schedules.alphas_cumprod(config).float(), EDMScheduleConfig()

    def discrete(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        rates = noise_schedules.signal_and_noise(table[timesteps.long()])
        return predict(flow, x, *rates, config.prediction_type)

    def scaled(x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        sigmas = (4 * told).exp()
        both = (sigmas.square() + edm.sigma_data**2).view(-1, 1, 1, 1)
        wide, at = x * both.sqrt(), sigmas.view(-1, 1, 1, 1)
        data = predict(flow, wide, torch.ones_like(sigmas), sigmas, "sample")
        return (data - edm.sigma_data**2 / both * wide) / (at * edm.sigma_data / both.sqrt())

    how = {"num_steps": NUM_STEPS, "seed": SEED}
    straight = partial(samplers.flow_sample, lambda x, told: flow(x, told / 1000), noise, ids, **how)
    return {
        "flow": straight(config=FlowScheduleConfig()),
        "flow, shifted": straight(config=FlowScheduleConfig(shift=2.0)),
        "flow, stochastic": straight(config=FlowScheduleConfig(stochastic_sampling=True)),
        "DDPM": samplers.ddpm_sample(discrete, noise, ids, config=config, **how),
        "DDIM": samplers.ddim_sample(discrete, noise, ids, config=config, **how),
        "DDIM, eta 0.5": samplers.ddim_sample(discrete, noise, ids, config=config, eta=0.5, **how),
        "Euler": samplers.sigma_euler_sample(discrete, noise, ids, config=config, **how),
        "Heun": samplers.heun_sample(discrete, noise, config=config, num_steps=NUM_STEPS),
        "EDM": samplers.edm_sample(scaled, noise, ids, config=edm, **how),
        "EDM, churned": samplers.edm_sample(scaled, noise, ids, config=edm, churn=4.0, **how),
    }


def draw(samples: dict[str, torch.Tensor], path: Path) -> None:
    """Write a row of digits for each sampler, one of each digit."""
    pyplot = train_digits._pyplot()
    figure, axes = pyplot.subplots(len(samples), 1, figsize=(6, 0.72 * len(samples)))
    for axis, (name, images) in zip(axes, samples.items(), strict=True):
        row = images[::SAMPLES_PER_DIGIT, 0]
        axis.imshow(row.permute(1, 0, 2).reshape(8, -1), cmap="gray", vmin=-1, vmax=1)
        axis.text(-1, 4, name, ha="right", va="center", fontsize=8)
        axis.axis("off")
    figure.subplots_adjust(left=0.24, right=1, top=1, bottom=0, hspace=0.05)
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> int:
    """Trains, samples, draws; the exit status says whether the statistics are the digits'."""
    parser = argparse.ArgumentParser(description="Sample a DiT trained on digits with every sampler.")
    parser.add_argument("--steps", type=int, default=train_digits.STEPS, help="of training (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for the picture (default: this one)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    state = train_digits.train_torch(options.steps, lambda loss: None).state
    labels = torch.arange(10).repeat_interleave(SAMPLES_PER_DIGIT)
    ids = torch.arange(len(labels))
    noise = samplers.starting_noise(ids, shape=(1, 8, 8), seed=RUN.seed)
    with torch.no_grad():
        samples = all_samples(velocity_of(state, labels), noise, ids)
    samples = {name: images.clamp(-1, 1) for name, images in samples.items()}
    draw(samples, options.folder / "samplers.png")

    real, near = Statistics.of(digits()[0]), True
    print(f"digits: mean {real.mean:.3f}, deviation {real.deviation:.3f}")
    for name, images in samples.items():
        found = Statistics.of(images)
        right = train_digits.accuracy(images.view(10, SAMPLES_PER_DIGIT, 8, 8).numpy())
        print(f"{name}: mean {found.mean:.3f}, deviation {found.deviation:.3f}; {right:.0%} of its samples are right")
        near &= abs(found.mean - real.mean) <= LARGEST_MEAN_ERROR
        near &= abs(found.deviation - real.deviation) <= LARGEST_DEVIATION_ERROR
    finite = all(bool(np.isfinite(images.numpy()).all()) for images in samples.values())
    return 0 if finite and (near or options.steps < train_digits.STEPS) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
