"""The step of text-latent diffusion with cycles, simulated: four passes of the model, one after the other, each overridable.

The model itself is the reference's.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gaugeblock.conformance.selftest.simulated.training import Run
from gaugeblock.reference import purposes, validation
from gaugeblock.reference.configs import CycleVAEConfig
from gaugeblock.reference.torch import random, text_latent_mmdit, training
from gaugeblock.reference.torch.train_cycle_vae import PARTS, Metrics, Tensors, frozen_names


class CycleTrainer(Run):
    """`train_cycle_vae.train_step`."""

    contract = "train_cycle_vae.train_step"
    claims: ClassVar[dict[str, Any]] = {"dtypes": ("float32",)}
    config: CycleVAEConfig

    def __call__(
        self,
        state: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor,
        latents: torch.Tensor,
        attention_mask: torch.Tensor,
        example_ids: torch.Tensor,
        *,
        config: CycleVAEConfig,
    ) -> tuple[Tensors, Metrics]:
        self.config, self.size = config, len(input_ids)
        self.reported = {name: torch.zeros(()) for name in PARTS}
        shapes, frozen = text_latent_mmdit.state_shapes(config.model), frozen_names(config)
        validation.cycle_vae_step(state, input_ids, latents, attention_mask, example_ids, config, shapes, frozen)
        model, trained, step = training.part_of_state(state, "model"), training.trained_names(state, config), int(state["step"])
        loss, gradients = self.add_up(model, trained, (input_ids, latents, attention_mask, example_ids), step)
        norm = self.norm(gradients)
        self.check(state["step"], loss, gradients, norm)
        weights = zip(("cycle_text_weight", "cycle_latent_weight"), map(torch.tensor, self.weights(step)), strict=True)
        metrics = Metrics(loss=loss, gradient_norm=norm, **self.reported, **dict(weights))
        return self.update(state, self.clip(gradients, norm)), metrics

    def check(self, step: torch.Tensor, loss: torch.Tensor, gradients: Tensors, norm: torch.Tensor) -> None:
        training.require_finite(step, self.reported | {"loss": loss}, gradients, norm)

    def losses(self, parameters: Tensors, *batch: Any) -> torch.Tensor:
        """Of each example, `[B]`."""
        ids, latents, mask, example_ids, step = batch
        self.parameters, self.mask = parameters, mask
        key = {"seed": self.config.seed, "step": step, "example": example_ids}
        text_weight, latent_weight = self.weights(step)
        total = torch.zeros(len(ids))
        self.report("latent_norm", latents.norm(dim=1))
        if self.config.mode != "l2t":
            drawn = self.drawn(latents, key, purposes.TRAINING_NOISE, purposes.TRAINING_TIMES)
            predicted, noised = self.text_to_latent(ids, latents, drawn)
            sample = self.implied(predicted, noised, *self.rates(drawn[1]))
            loss = self.distance(predicted, self.target(latents, drawn[0], *self.rates(drawn[1])))
            total = total + self.latent_loss_weight() * self.reports("base_t2l_latent_loss", loss)
            self.report("t_lat_mean", drawn[1].float())
            self.report("latent_pred_norm", predicted.norm(dim=1))
            self.report("x0_pred_norm", sample.norm(dim=1))
        if self.config.mode != "t2l":
            logits = self.latent_to_text(ids, latents)
            total = total + self.reports("base_l2t_text_loss", self.bounded(self.entropy(logits, ids)))
        if text_weight > 0:
            again = self.latent_to_text(ids, self.cut(sample), **self.told_in_cycle(drawn))
            total = total + text_weight * self.reports("cycle_text_loss", self.bounded(self.entropy(again, ids)))
        if latent_weight > 0:
            tokens = self.chosen(logits.detach(), key)
            other = self.drawn(latents, key, *self.purposes_of_cycle())
            clean = self.noised_in_cycle(latents, sample)
            predicted, _ = self.text_to_latent(tokens, clean, other)
            aim = self.target_of_cycle(latents, drawn, other)
            total = total + self.cycle_weight(latent_weight) * self.reports("cycle_latent_loss", self.distance(predicted, aim))
        return total

    def reports(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """They are reported, and come back."""
        self.report(name, values)
        return values

    def report(self, name: str, values: torch.Tensor) -> None:
        """A microbatch's part of a mean."""
        self.reported[name] = self.reported[name] + values.detach().sum() / self.size

    # ---------------------------------------------------------------------------------------------------------- passes

    def text_to_latent(self, tokens: torch.Tensor, latents: torch.Tensor, drawn: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What is predicted of noised latents, and these."""
        noise, times = drawn
        noised = self.noised(latents, noise, *self.rates(times))
        told = self.told(torch.zeros(len(tokens)), times.float())
        return self.of_model(tokens, noised, *told)[1][:, 0], noised

    def latent_to_text(self, ids: torch.Tensor, latents: torch.Tensor, time: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of all places."""
        known = torch.zeros(len(ids)) if time is None else time.float()
        return self.of_model(self.masked(ids), latents, *self.told(torch.ones(len(ids)), known))[0]

    def of_model(self, *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the model makes of them."""
        model: Any = text_latent_mmdit.text_latent_mmdit
        return model(self.parameters, *arrays, self.mask, config=self.config.model)

    def masked(self, ids: torch.Tensor) -> torch.Tensor:
        """What stands for a text that is predicted."""
        return ids * 0 + self.config.mask_token_id

    def told(self, of_text: torch.Tensor, of_latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Times, as the model is told them."""
        return of_text, of_latent

    def told_in_cycle(self, drawn: Any) -> dict[str, Any]:
        """More of what the cycle through a latent is told."""
        return {}

    def cut(self, sample: torch.Tensor) -> torch.Tensor:
        """A predicted latent, as the cycle takes it."""
        return sample.detach() if self.config.cycle_stop_grad_latent else sample

    def noised_in_cycle(self, latents: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Which latents are noised in the cycle through a text."""
        return latents

    def chosen(self, logits: torch.Tensor, key: dict[str, Any]) -> torch.Tensor:
        """A text."""
        if self.config.cycle_latent_sampling == "argmax":
            return logits.argmax(-1)
        uniforms = random.uniform(tuple(logits.shape[1:]), **key, purpose=purposes.PSEUDO_TOKENS)
        return (self.tempered(logits) - (-uniforms.log()).log()).argmax(-1)

    def tempered(self, logits: torch.Tensor) -> torch.Tensor:
        """Before a token is drawn."""
        return logits / self.config.cycle_latent_temperature

    # ----------------------------------------------------------------------------------------------------------- noise

    def drawn(self, latents: torch.Tensor, key: dict[str, Any], noise: int, times: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise, and times in float64."""
        drawn = random.normal(latents.shape[1:], **key, purpose=noise)
        if self.config.latent_t_mode == "full":
            return drawn, torch.ones(len(latents), dtype=torch.float64)
        uniform = random.uniform((), **key, purpose=times).double()
        first, last = self.config.latent_t_min, self.config.latent_t_max
        return drawn, (first + uniform * (last - first)).clamp(max=0.9999)

    def purposes_of_cycle(self) -> tuple[int, int]:
        """Of the draws of the cycle through a text."""
        return purposes.CYCLE_NOISE, purposes.CYCLE_TIMES

    def rates(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of latents and noise, `[B, 1]`."""
        left = self.remaining()[self.places(times)][:, None]
        return left.sqrt().float(), (1 - left).sqrt().float()

    def places(self, times: torch.Tensor) -> torch.Tensor:
        """In the table."""
        return (times * 999).floor().long()

    def remaining(self) -> torch.Tensor:
        """Of a latent's variance, at each timestep."""
        return (1 - self.betas().clamp(1e-4, 0.9999)).cumprod(0)

    def betas(self) -> torch.Tensor:
        """Before they are clipped."""
        cosine = ((torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * math.pi / 2).cos() ** 2
        return 1 - cosine[1:] / cosine[:-1]

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the model sees."""
        return alpha * latents + sigma * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What it should predict."""
        velocity = alpha * noise - sigma * latents
        return {"epsilon": noise, "sample": latents, "v_prediction": velocity}[self.config.prediction_type]

    def target_of_cycle(self, latents: torch.Tensor, drawn: Any, other: Any) -> torch.Tensor:
        """What it should predict in the cycle through a text."""
        return self.target(latents, other[0], *self.rates(other[1]))

    def implied(self, predicted: torch.Tensor, noised: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The latent that a prediction says."""
        match self.config.prediction_type:
            case "epsilon":
                return (noised - sigma * predicted) / alpha
            case "sample":
                return predicted
            case _:
                return alpha * noised - sigma * predicted

    # ---------------------------------------------------------------------------------------------------------- losses

    def distance(self, predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of each example, `[B]`."""
        return (self.direction(predicted) - self.direction(target)).square().mean(1)

    def direction(self, latents: torch.Tensor) -> torch.Tensor:
        """Of length 1."""
        return latents / latents.norm(dim=1, keepdim=True).clamp(min=1e-8)

    def entropy(self, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Of each example, `[B]`."""
        return -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0].mean(1)

    def bounded(self, losses: torch.Tensor) -> torch.Tensor:
        """What is finite is 100 at most."""
        return torch.where(losses.isfinite(), losses.clamp(max=100), losses)

    def latent_loss_weight(self) -> float:
        """Of the first pass."""
        return self.config.latent_loss_weight

    def cycle_weight(self, weight: float) -> float:
        """Of the last pass."""
        return weight

    def weights(self, step: int) -> tuple[float, float]:
        """Of both cycles."""
        config = self.config
        if config.mode != "cycle":
            return 0.0, 0.0
        text = self.ramp(step, config.cycle_text_weight, config.cycle_text_warmup_steps, config.cycle_text_ramp_steps)
        latent = self.ramp(step, config.cycle_latent_weight, config.cycle_latent_warmup_steps, config.cycle_latent_ramp_steps)
        return self.by_turns(step, text, latent)

    def ramp(self, step: int, weight: float, warmup: int, length: int) -> float:
        """Of one cycle."""
        if step < warmup:
            return 0.0
        return weight * min(step - warmup, length) / length if length else weight

    def by_turns(self, step: int, text: float, latent: float) -> tuple[float, float]:
        """Where cycles take turns, one of them is 0."""
        every = self.config.cycle_every
        if every is None:
            return text, latent
        return (text, 0.0) if step % (2 * every) < every else (0.0, latent)
