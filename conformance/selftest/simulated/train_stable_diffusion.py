"""The Stable Diffusion training step, simulated: what is encoded, drawn, told and weighted, each written out and overridable.

The models themselves are the references'.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gaugeblock.conformance.selftest.simulated.training import Run
from gaugeblock.reference import purposes, states, validation
from gaugeblock.reference.configs import CLIPTextConfig, StableDiffusionConfig
from gaugeblock.reference.torch import clip_text, random, training, unet, vae
from gaugeblock.reference.torch.train_stable_diffusion import Metrics, Tensors, frozen_shapes, state_shapes, unused_names


class StableTrainer(Run):
    """`train_stable_diffusion.train_step`."""

    contract = "train_stable_diffusion.train_step"
    claims: ClassVar[dict[str, Any]] = {"dtypes": ("float32",)}
    config: StableDiffusionConfig

    def __call__(
        self,
        state: Mapping[str, torch.Tensor],
        frozen: Mapping[str, torch.Tensor],
        images: torch.Tensor,
        input_ids: torch.Tensor,
        time_ids: torch.Tensor,
        example_ids: torch.Tensor,
        *,
        config: StableDiffusionConfig,
    ) -> tuple[Tensors, Metrics]:
        self.config = config
        shapes = state_shapes(config), frozen_shapes(config), unused_names(config)
        validation.stable_diffusion_step(state, frozen, images, input_ids, time_ids, example_ids, config, *shapes)
        self.frozen, model = frozen, training.part_of_state(state, "model")
        step, trained = int(state["step"]), training.trained_names(state, config)
        loss, gradients = self.add_up(model, trained, (images, input_ids, time_ids, example_ids), step)
        norm = self.norm(gradients)
        self.check(state["step"], loss, gradients, norm)
        return self.update(state, self.clip(gradients, norm)), Metrics(loss, norm)

    def losses(self, parameters: Tensors, *batch: Any) -> torch.Tensor:
        """Of each example, `[B]`."""
        images, input_ids, time_ids, ids, step = batch
        key = {"seed": self.config.seed, "step": step, "example": ids}
        latents = self.latents(images, key)
        noise, offset, more = (self.drawn(shape, key, purpose) for shape, purpose in (
            (latents.shape[1:], purposes.TRAINING_NOISE),
            (self.offset_shape(latents), purposes.NOISE_OFFSET),
            (latents.shape[1:], purposes.INPUT_PERTURBATION),
        ))  # fmt: skip
        noise = noise + self.config.noise_offset * offset
        timesteps = self.timesteps(key)
        remaining = self.remaining()[timesteps].float()[:, None, None, None]
        noised = self.noised(latents, noise + self.config.input_perturbation * more, remaining)
        hidden, pooled = self.texts(parameters, input_ids)
        kept = random.uniform((), **key, purpose=purposes.LABEL_DROPOUT) >= self.config.text_dropout
        hidden, pooled = self.drop(hidden, pooled, kept)

        told = (pooled, self.time_ids(time_ids)) if self.config.is_told_sizes else ()
        model = unet.unet_text_time if self.config.is_told_sizes else unet.unet
        own = states.part(parameters, "unet")
        predicted = model(own, noised, self.told_timesteps(timesteps), hidden, *told, config=self.config.unet)
        target = self.target(latents, noise, offset * self.config.noise_offset, more, remaining)
        losses = (self.output(predicted, noise) - target).square().mean((1, 2, 3))
        return self.weighted(losses, self.weights(self.remaining()[timesteps]).float())

    # -------------------------------------------------------------------------------------------------- images, draws

    def latents(self, images: torch.Tensor, key: dict[str, Any]) -> torch.Tensor:
        """Those that are trained on."""
        config = self.config.vae
        assert config is not None
        mean, logvar = vae.encode(states.part(self.frozen, "vae"), images, config=config)
        return self.scale() * self.posterior(mean, logvar, self.drawn(mean.shape[1:], key, self.purpose_of_latents()))

    def purpose_of_latents(self) -> int:
        """Of their draws."""
        return purposes.LATENT_NOISE

    def posterior(self, mean: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A draw of the encoder's distribution."""
        return mean + (logvar / 2).exp() * noise

    def scale(self) -> float:
        """What latents are multiplied by."""
        assert self.config.vae is not None
        return self.config.vae.scaling_factor

    def drawn(self, shape: tuple[int, ...], key: dict[str, Any], purpose: int) -> torch.Tensor:
        """Standard normal numbers."""
        return random.normal(shape, **key, purpose=purpose)

    def offset_shape(self, latents: torch.Tensor) -> tuple[int, ...]:
        """Of what is added to an example's noise."""
        return (latents.shape[1], 1, 1)

    def timesteps(self, key: dict[str, Any]) -> torch.Tensor:
        """`[B]`, whole numbers."""
        drawn = random.uniform((), **key, purpose=purposes.TRAINING_TIMES).double()
        cumulative = self.frequencies().cumsum(0)
        return torch.searchsorted(cumulative, drawn * cumulative[-1], right=True).clamp(max=len(cumulative) - 1)

    def frequencies(self) -> torch.Tensor:
        """How often each timestep is drawn."""
        config = self.config
        count = config.schedule.num_train_timesteps
        frequencies = torch.ones(count, dtype=torch.float64)
        portion = int(config.bias_portion * count)
        biased = {
            "earlier": slice(0, portion),
            "later": slice(count - portion, count),
            "range": slice(config.bias_begin, config.bias_end),
        }
        if config.timestep_bias != "none":
            frequencies[biased[config.timestep_bias]] = config.bias_multiplier
        return frequencies

    def told_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the UNet is told of them."""
        return timesteps.float()

    # ----------------------------------------------------------------------------------------------------------- noise

    def remaining(self) -> torch.Tensor:
        """Of the data's variance, at each timestep, float64."""
        schedule = self.config.schedule
        betas = self.betas(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)
        remaining = (1 - betas).cumprod(0)
        return self.rescaled(remaining) if schedule.rescale_betas_zero_snr else remaining

    def betas(self, first: float, last: float, count: int) -> torch.Tensor:
        """Of Stable Diffusion."""
        return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64).square()

    def rescaled(self, remaining: torch.Tensor) -> torch.Tensor:
        """With nothing left at the last timestep."""
        roots = remaining.sqrt()
        return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, remaining: torch.Tensor) -> torch.Tensor:
        """What the UNet sees."""
        return remaining.sqrt() * latents + (1 - remaining).sqrt() * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, offset: torch.Tensor, more: torch.Tensor, remaining: torch.Tensor
    ) -> torch.Tensor:
        """What the UNet should predict."""
        match self.config.schedule.prediction_type:
            case "epsilon":
                return noise
            case "sample":
                return latents
            case _:
                return remaining.sqrt() * noise - (1 - remaining).sqrt() * latents

    def output(self, predicted: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What is compared with the target."""
        return predicted

    def weights(self, remaining: torch.Tensor) -> torch.Tensor:
        """By how much examples count, `[B]`."""
        gamma = self.config.snr_gamma
        return torch.ones_like(remaining) if gamma is None else self.min_snr(remaining / (1 - remaining), gamma)

    def min_snr(self, ratio: torch.Tensor, gamma: float) -> torch.Tensor:
        """The weights of a ratio of signal to noise."""
        divisors = {"epsilon": ratio, "sample": torch.ones_like(ratio), "v_prediction": ratio + 1}
        return ratio.clamp(max=gamma) / divisors[self.config.schedule.prediction_type]

    def weighted(self, losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Of each example."""
        return weights * losses

    # ------------------------------------------------------------------------------------------------------------ text

    def texts(self, parameters: Tensors, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the encoders make of captions: hidden states side by side, and the last one's pooled result."""
        encoded = [
            self.encoded(states.part({**self.frozen, **parameters}, name), input_ids[:, self.place(place)], encoder)
            for place, (name, encoder) in enumerate(zip(self.config.text_encoder_names, self.config.text_encoders, strict=True))
        ]
        return torch.cat([hidden for hidden, _ in encoded], dim=-1), encoded[-1][1]

    def encoded(self, own: Tensors, input_ids: torch.Tensor, encoder: CLIPTextConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """What one encoder makes of captions."""
        return clip_text.clip_text(own, input_ids, config=encoder)

    def place(self, place: int) -> int:
        """Where the ids of the encoder at a place are."""
        return place

    def drop(self, hidden: torch.Tensor, pooled: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts of which some are not told."""
        return torch.where(kept[:, None, None], hidden, 0), torch.where(kept[:, None], pooled, 0)

    def time_ids(self, time_ids: torch.Tensor) -> torch.Tensor:
        """Numbers that the UNet is told."""
        return time_ids
