"""Sample digits with every sampler: from a UNet on pixels, and from a DiT on the latents of a VAE.

    python demo/sample_digits.py             from the trained models that lie beside it
    python demo/sample_digits.py --train     trains them first (some minutes on two cores)

The UNet predicts the noise of Stable Diffusion's schedule, the DiT the velocity of a rectified flow; both are told the digit, or
nothing, and samples are guided. Writes samplers.png, a row for each sampler, and says of each how many of its samples a
classifier takes for the digit that was asked for, and how far their means and deviations lie from the data's.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from digits import accuracy, batches, digits, distances
from safetensors.torch import load_file, save_file
from training import initial_parameters

from gaugeblock.reference import states
from gaugeblock.reference.configs import (
    DIFFUSION_SCHEDULE_PRESETS,
    DiTConfig,
    EDMScheduleConfig,
    FlowScheduleConfig,
    UNetConfig,
    VAEConfig,
)
from gaugeblock.reference.torch import dit, noise_schedules, objectives, predictions, random, samplers, unet, vae
from gaugeblock.reference.unet_states import state_shapes as unet_shapes

VAE = VAEConfig(in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
DIT = DiTConfig(
    input_size=4, patch_size=1, in_channels=4, hidden_size=64, depth=3, num_heads=4, num_classes=10, learn_sigma=False
)
UNET = UNetConfig(
    in_channels=1, out_channels=1, block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    layers_per_block=1, transformer_layers_per_block=(1, 1), attention_head_dim=(2, 2), cross_attention_dim=16, norm_num_groups=4,
)  # fmt: skip
SCHEDULE = replace(DIFFUSION_SCHEDULE_PRESETS["stable-diffusion-1"], timestep_spacing="trailing")
NO_DIGIT, DROPPED = 10, 0.1
SEED, BATCH_SIZE, KL_WEIGHT = 11, 128, 1e-3
STEPS = {"vae": 1000, "dit": 1500, "unet": 2000}
SAMPLING_STEPS, GUIDANCE_SCALE = 24, 1.5
TEXT = "text"  # the table that stands for a text encoder: a token for each digit, and one for none
TRAINING = 2**32 - 3  # the purpose of draws, with the two below it, which no trainer has

State = dict[str, torch.Tensor]
Loss = Callable[[State, torch.Tensor, torch.Tensor, Callable[..., torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class Models:
    """Trained parameters, and what latents are multiplied by so that their variance is 1."""

    vae: State
    dit: State
    unet: State
    scale: float


def train(name: str, state: State, loss_of: Loss, learning_rate: float) -> State:
    """AdamW with a cosine from the learning rate to 0; says the mean loss of the last tenth of the steps."""
    state = {key: tensor.clone().requires_grad_() for key, tensor in state.items()}
    optimizer = torch.optim.AdamW(state.values(), lr=learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS[name])
    losses = []
    for step, (images, labels, ids) in enumerate(batches(STEPS[name], BATCH_SIZE, SEED)):
        is_dropped = random.uniform((), seed=SEED, step=step, example=ids, purpose=TRAINING) < DROPPED
        draw = partial(_draw, step=step, ids=ids)
        loss = loss_of(state, images, labels.masked_fill(is_dropped, NO_DIGIT), draw)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.values(), 1.0)
        optimizer.step()
        decay.step()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"{name}: step {step + 1} of {STEPS[name]}, loss {np.mean(losses[-100:]):.4f}", flush=True)
    return {key: tensor.detach() for key, tensor in state.items()}


def _draw(kind: str, shape: tuple[int, ...], *, step: int, ids: torch.Tensor) -> torch.Tensor:
    """Uniform or normal numbers for each example of a step."""
    of = random.uniform if kind == "uniform" else random.normal
    return of(shape, seed=SEED, step=step, example=ids, purpose=TRAINING - 1 - (kind == "uniform"))


def vae_loss(state: State, images: torch.Tensor, _: torch.Tensor, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Squared errors of what is decoded, and a little of the divergence from a standard normal."""
    mean, logvar = vae.encode(state, images, config=VAE)
    latents = vae.sample(mean, logvar, draw("normal", tuple(mean.shape[1:])))
    divergence = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
    return (vae.decode(state, latents, config=VAE) - images).square().mean() + KL_WEIGHT * divergence


def dit_loss(encoder: State, scale: float, state: State, images: torch.Tensor, labels: torch.Tensor,
             draw: Callable[..., torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """Of the velocity between latents and noise."""
    with torch.no_grad():
        latents = scale * vae.encode(encoder, images, config=VAE)[0]
    noise, times = draw("normal", tuple(latents.shape[1:])), draw("uniform", ())
    x = objectives.rectified_flow_interpolate(latents, noise, times)
    velocity = dit.dit(state, x, objectives.TIMESTEPS * times, labels, config=DIT)
    return objectives.rectified_flow_loss(velocity, latents, noise, velocity="noise - data").mean()


def unet_loss(state: State, images: torch.Tensor, labels: torch.Tensor, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Of the noise in images at uniform timesteps."""
    noise = draw("normal", tuple(images.shape[1:]))
    timesteps = (draw("uniform", ()) * SCHEDULE.num_train_timesteps).long()
    alphas, sigmas = noise_schedules.signal_and_noise(noise_schedules.alphas_cumprod(SCHEDULE)[timesteps])
    x = predictions.add_noise(images, noise, alphas.float(), sigmas.float())
    return (predict_noise(state, x, timesteps.float(), labels) - noise).square().mean()


def predict_noise(state: State, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The UNet, which looks at one token."""
    own = {name: tensor for name, tensor in state.items() if name != TEXT}
    return unet.unet(own, x, timesteps, state[TEXT][labels, None], config=UNET)


def trained() -> Models:
    """Train all three."""
    autoencoder = train("vae", initial_parameters(vae.state_shapes(VAE), SEED), vae_loss, 3e-3)
    with torch.no_grad():
        scale = 1 / vae.encode(autoencoder, digits()[0], config=VAE)[0].std().item()
    transformer = train("dit", dit.initial_state(DIT, seed=SEED), partial(dit_loss, autoencoder, scale), 2e-3)
    convolutional = train(
        "unet", initial_parameters({**unet_shapes(UNET), TEXT: (NO_DIGIT + 1, UNET.cross_attention_dim)}, SEED), unet_loss, 2e-3
    )
    return Models(autoencoder, transformer, convolutional, scale)


def save(models: Models, path: Path) -> None:
    """Write the models in half precision, which samples do not tell from float32."""
    parts = states.under("vae", models.vae) | states.under("dit", models.dit) | states.under("unet", models.unet)
    save_file({name: tensor.half().contiguous() for name, tensor in parts.items()}, path, {"scale": repr(models.scale)})


def load(path: Path) -> Models:
    """Read what `save` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        scale = float(file.metadata()["scale"])
    parts = {name: tensor.float() for name, tensor in load_file(path).items()}
    return Models(*(states.part(parts, name) for name in ("vae", "dit", "unet")), scale)


def of_edm(model: samplers.Model, config: EDMScheduleConfig) -> samplers.Model:
    """A model of noise as EDM's sampler asks one: told log(sigma) / 4, its input and output scaled by sigma.

    What it is to give is F with data = c_skip x + c_out F, and the model's noise says data = x - sigma * noise.
    """
    alphas, sigmas = noise_schedules.signal_and_noise(noise_schedules.alphas_cumprod(SCHEDULE))
    log_sigmas = torch.log(sigmas / alphas)

    def predict(scaled: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        sigma = math.exp(4 * float(told[0]))
        timestep = np.interp(math.log(sigma), log_sigmas.numpy(), np.arange(len(log_sigmas)))
        whole = math.hypot(sigma, config.sigma_data)
        x = scaled * whole
        data = x - sigma * model(x / math.hypot(sigma, 1), torch.full_like(told, float(timestep)))
        return (data - config.sigma_data**2 / whole**2 * x) / (sigma * config.sigma_data / whole)

    return predict


def sample_all(models: Models, labels: torch.Tensor) -> dict[str, np.ndarray]:
    """Samples of these digits by each sampler, [N, 8, 8] in [-1, 1]."""
    ids = torch.arange(len(labels))
    how = {"num_steps": SAMPLING_STEPS, "seed": SEED}
    guidance = {"null_label": NO_DIGIT, "guidance_scale": GUIDANCE_SCALE}
    of_noise = samplers.guided(partial(predict_noise, models.unet), labels, **guidance)
    of_velocity = samplers.guided(partial(dit.dit, models.dit, config=DIT), labels, **guidance)
    pixels = samplers.starting_noise(ids, shape=(1, 8, 8), seed=SEED)
    latents = samplers.starting_noise(ids, shape=(4, 4, 4), seed=SEED)
    sigmas = noise_schedules.sigmas(SCHEDULE, SAMPLING_STEPS)[0]
    edm = EDMScheduleConfig(sigma_min=float(sigmas[-2]), sigma_max=float(sigmas[0]))
    flow = FlowScheduleConfig()

    def decoded(sampled: torch.Tensor) -> torch.Tensor:
        return vae.decode(models.vae, sampled / models.scale, config=VAE)

    with torch.no_grad():
        images = {
            "DDPM": samplers.ddpm_sample(of_noise, pixels, ids, config=SCHEDULE, **how),
            "DDIM": samplers.ddim_sample(of_noise, pixels, ids, config=SCHEDULE, **how),
            "DDIM, eta 1": samplers.ddim_sample(of_noise, pixels, ids, config=SCHEDULE, eta=1.0, **how),
            "Euler": samplers.sigma_euler_sample(of_noise, pixels, ids, config=SCHEDULE, **how),
            "Euler, churn": samplers.sigma_euler_sample(of_noise, pixels, ids, config=SCHEDULE, churn=4.0, **how),
            "Heun": samplers.heun_sample(of_noise, pixels, config=SCHEDULE, num_steps=SAMPLING_STEPS),
            "EDM": samplers.edm_sample(of_edm(of_noise, edm), pixels, ids, config=edm, **how),
            "flow": decoded(samplers.flow_sample(of_velocity, latents, ids, config=flow, **how)),
            "flow, shift 3": decoded(samplers.flow_sample(of_velocity, latents, ids, config=replace(flow, shift=3.0), **how)),
            "flow, new noise": decoded(
                samplers.flow_sample(of_velocity, latents, ids, config=replace(flow, stochastic_sampling=True), **how)
            ),
        }
    return {name: each[:, 0].clamp(-1, 1).numpy() for name, each in images.items()}


def draw(samples: Mapping[str, np.ndarray], path: Path, num_columns: int = 20) -> None:
    """Write a row of pictures for each sampler, the first ones of each digit side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(samples), 1, figsize=(9, 0.55 * len(samples)))
    for axis, (name, images) in zip(axes, samples.items(), strict=True):
        chosen = images[np.linspace(0, len(images) - 1, num_columns).round().astype(int)]
        axis.imshow(chosen.transpose(1, 0, 2).reshape(8, -1), cmap="gray", vmin=-1, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> int:
    """Trains if asked, samples, draws."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Sample digits with every sampler.")
    parser.add_argument("--train", action="store_true", help="train the models first, and write them")
    parser.add_argument("--models", type=Path, default=here / "digit_models.safetensors", help="where they lie")
    parser.add_argument("--per-digit", type=int, default=20, help="samples of each digit (default: 20)")
    parser.add_argument(
        "--picture", type=Path, default=here / "samplers.png", help="what is written (default: samplers.png here)"
    )
    options = parser.parse_args(arguments)
    if options.train:
        save(trained(), options.models)
    labels = torch.arange(10).repeat_interleave(options.per_digit)
    samples = sample_all(load(options.models), labels)
    for name, images in samples.items():
        means, deviations = distances(images, labels.numpy())
        right = accuracy(images, labels.numpy())
        print(f"{name:16} {right:4.0%} right; means are {means:.3f} off, deviations {deviations:.3f}")
    draw(samples, options.picture)
    print(f"picture: {options.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
