"""Bugs of trainers of text-latent diffusion with cycles."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.train_cycle_vae import CycleTrainer
from gaugeblock.reference import purposes
from gaugeblock.reference.torch import training

TRAINER = "LGDLM cycle_vae_trainer.py"


@fault(caught_by="parity", kind="gradient", source=f"{TRAINER}, without cycle_stop_grad_latent")
class CycleGradientThroughTheLatent(CycleTrainer):
    """The loss of a text that is predicted from a predicted latent is differentiated by the latent, though it should not be."""

    def cut(self, sample):
        return sample


@fault(caught_by="parity", kind="gradient", source=f"{TRAINER}: cycle_stop_grad_latent is accepted and ignored")
class LatentAlwaysCut(CycleTrainer):
    """That loss is never differentiated by the latent."""

    def cut(self, sample):
        return sample.detach()


@fault(caught_by="parity", kind="boundary", source=f"{TRAINER}, _ramp_weight with step + 1")
class RampOneStepEarly(CycleTrainer):
    """Weights are those of the next update."""

    def ramp(self, step, weight, warmup, length):
        return super().ramp(step + 1, weight, warmup, length)


@fault(caught_by="parity", kind="boundary", source=f"{TRAINER}, _ramp_weight: step / ramp_steps")
class RampWithoutItsWarmup(CycleTrainer):
    """A ramp begins where the run does, and jumps where its warm-up ends."""

    def ramp(self, step, weight, warmup, length):
        return weight * min(step, length) / length if length and step >= warmup else super().ramp(step, weight, warmup, length)


@fault(caught_by="parity", kind="boundary", source=f"{TRAINER}: the weight of a step that is None")
class WholeWeightInTheWarmup(CycleTrainer):
    """Cycles have their whole weight before their ramps."""

    def ramp(self, step, weight, warmup, length):
        return weight if step <= warmup else super().ramp(step, weight, warmup, length)


@fault(caught_by="parity", kind="structural", source="[B, 1, L] against [B, L]: LGDLM's step on its own model")
class EveryExampleWithEveryOther(CycleTrainer):
    """A latent is compared with those of all examples."""

    def distance(self, predicted, target):
        return (self.direction(predicted)[:, None] - self.direction(target)).square().mean((1, 2))


@fault(caught_by="parity", kind="structural", source="F.mse_loss(latent_pred, latent_target)")
class LatentsOfAnyLength(CycleTrainer):
    """Latents are compared as they are, not their directions."""

    def direction(self, latents):
        return latents


@fault(caught_by="parity", kind="structural", source="1 - cosine_similarity for the mean of squares")
class CosineDistance(CycleTrainer):
    """The loss of latents is 1 - cos."""

    def distance(self, predicted, target):
        return 1 - (self.direction(predicted) * self.direction(target)).sum(1)


@fault(caught_by="parity", kind="structural", source="loss * attention_mask; the public step counts padding")
class PaddingLeftOut(CycleTrainer):
    """Cross-entropies are averaged over what is no padding."""

    def entropy(self, logits, ids):
        each = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        return (each * self.mask).sum(1) / self.mask.sum(1).clamp(min=1)


@fault(caught_by="parity", kind="structural", source="text_tokens=input_ids in the second pass")
class TextIsTold(CycleTrainer):
    """A text is predicted from itself."""

    def masked(self, ids):
        return ids


@fault(caught_by="parity", kind="structural", source="(latent_timesteps, text_timesteps)")
class TimesExchanged(CycleTrainer):
    """The text's time is told as the latent's."""

    def told(self, of_text, of_latent):
        return of_latent, of_text


@fault(caught_by="parity", kind="structural", source="t * 1000, as image models are told")
class TimesInThousandths(CycleTrainer):
    """Times are told as timesteps."""

    def told(self, of_text, of_latent):
        return 0.999 * of_text, 0.999 * of_latent


@fault(caught_by="parity", kind="structural", source="latent_timesteps=t_lat in the third pass")
class PredictedLatentToldNoisy(CycleTrainer):
    """The time of a predicted latent is that at which it was predicted."""

    def told_in_cycle(self, drawn):
        return {"time": drawn[1]}


@fault(caught_by="parity", kind="boundary", source="round for trunc")
class TimestepsRounded(CycleTrainer):
    """Timesteps are rounded, not cut off."""

    def places(self, times):
        return (times * 999).round().long()


@fault(caught_by="parity", kind="boundary", source="times in units of num_timesteps")
class AThousandTimesteps(CycleTrainer):
    """A time of 1 is that after the last one, and is moved back to it."""

    def places(self, times):
        return (times * 1000).floor().long().clamp(max=999)


@fault(caught_by="parity", kind="structural", source="torch.linspace(1e-4, 0.02, T): latent_beta_schedule ignored")
class BetasAreLinear(CycleTrainer):
    """Betas rise in a line."""

    def betas(self):
        return torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


@fault(caught_by="parity", kind="structural", source=f"{TRAINER}: noise2 = noise")
class CycleOfTheSameNoise(CycleTrainer):
    """Both passes that predict latents have the same noise."""

    def purposes_of_cycle(self):
        return purposes.TRAINING_NOISE, purposes.CYCLE_TIMES


@fault(caught_by="parity", kind="structural", source=f"{TRAINER}: t_lat2 = t_lat")
class CycleOfTheSameTimes(CycleTrainer):
    """Both passes that predict latents have the same times."""

    def purposes_of_cycle(self):
        return purposes.CYCLE_NOISE, purposes.TRAINING_TIMES


@fault(caught_by="parity", kind="structural", source=f"{TRAINER}: latent_target for latent_target2")
class CycleOfTheFirstTarget(CycleTrainer):
    """The last pass should predict what the first should."""

    def target_of_cycle(self, latents, drawn, other):
        return self.target(latents, drawn[0], *self.rates(drawn[1]))


@fault(caught_by="parity", kind="structural", source="CycleGAN's reconstruction: what was predicted is noised again")
class CycleNoisesThePrediction(CycleTrainer):
    """The last pass noises the predicted latent, not the true one."""

    def noised_in_cycle(self, latents, sample):
        return sample.detach()


@fault(caught_by="parity", kind="structural", source="predict_x0_from_eps whatever the parameterization")
class PredictionsAreNoise(CycleTrainer):
    """Whatever is predicted is taken for noise."""

    def implied(self, predicted, noised, alpha, sigma):
        return (noised - sigma * predicted) / alpha


@fault(caught_by="parity", kind="structural", source="Salimans and Ho (arXiv:2202.00512), the sign of v")
class VelocityOfTheOtherSign(CycleTrainer):
    """A velocity points to the data."""

    def target(self, latents, noise, alpha, sigma):
        target = super().target(latents, noise, alpha, sigma)
        return -target if self.config.prediction_type == "v_prediction" else target


@fault(caught_by="parity", kind="structural", source="latent_loss_weight * cycle_latent_loss")
class CycleWeightedTwice(CycleTrainer):
    """The weight of latents scales the cycle's loss too."""

    def cycle_weight(self, weight):
        return weight * self.config.latent_loss_weight


@fault(caught_by="parity", kind="structural", source="logits * temperature")
class TemperatureMultiplies(CycleTrainer):
    """The higher the temperature, the surer the draw."""

    def tempered(self, logits):
        return logits * self.config.cycle_latent_temperature


@fault(caught_by="parity", kind="structural", source="cycle_latent_sampling accepted and ignored")
class AlwaysTheMostProbable(CycleTrainer):
    """Tokens are never drawn."""

    def chosen(self, logits, key):
        return logits.argmax(-1)


@fault(caught_by="parity", kind="structural", source="cycle_every accepted and ignored")
class BothCyclesInEveryUpdate(CycleTrainer):
    """Cycles take no turns."""

    def by_turns(self, step, text, latent):
        return text, latent


@fault(caught_by="parity", kind="boundary", source="step % cycle_every for step // cycle_every % 2")
class TurnsOfOneUpdate(CycleTrainer):
    """One cycle has the first update of each turn, the other one all else."""

    def by_turns(self, step, text, latent):
        every = self.config.cycle_every
        return super().by_turns(step, text, latent) if every is None else (0.0, latent) if step % every else (text, 0.0)


@fault(caught_by="parity", kind="structural", source="optimizer of model.parameters(): decay of what has no gradient")
class FrozenDecays(CycleTrainer):
    """What a single mode freezes is multiplied by what weight decay leaves."""

    def update(self, state, gradients):
        new = super().update(state, gradients)
        kept = 1 - self.config.learning_rate * self.config.weight_decay
        return {
            name: each * kept if name.startswith("model.") and name[6:] not in gradients else each for name, each in new.items()
        }


@fault(caught_by="parity", kind="boundary", source="LGDLM utils/lr.py: (step + 1) / warmup; diffusers: step / warmup")
class WarmupOfDiffusers(CycleTrainer):
    """The first update of a warm-up has a learning rate of 0 in any run."""

    def warm(self, updates):
        count = self.config.num_warmup_steps
        return min(1.0, updates / count) if count else 1.0


@fault(caught_by="parity", kind="structural", source="LGDLM utils/lr.py: down to a tenth; diffusers: to 0")
class CosineOfDiffusers(CycleTrainer):
    """The learning rate falls to 0."""

    def fall(self, updates):
        least = self.config.final_learning_rate_ratio
        return (super().fall(updates) - least) / (1 - least)


@fault(caught_by="rejections", kind="error-contract", source=f"{TRAINER}: latents with a NaN give a loss of 0.01")
class ASmallLossForNone(CycleTrainer):
    """A loss that is not finite becomes 0.01, and gradients that are not, 0."""

    def check(self, step, loss, gradients, norm):
        for each in (*gradients.values(), norm):
            each.nan_to_num_(0.0, 0.0, 0.0)
        self.reported = {name: each.nan_to_num() for name, each in self.reported.items()}
        loss.nan_to_num_(0.01)


@fault(caught_by="rejections", kind="error-contract", source=f"{TRAINER}: clamp(0, 100) before the check")
class InfinityBounded(CycleTrainer):
    """An infinite cross-entropy is 100 before anybody looks, and a part that is none is 0."""

    def bounded(self, losses):
        return losses.nan_to_num(0.0, 100.0).clamp(0, 100)

    def distance(self, predicted, target):
        return super().distance(predicted, target).nan_to_num()

    def check(self, step, loss, gradients, norm):
        finite = {name: each.nan_to_num() for name, each in gradients.items()}
        for name, each in finite.items():
            gradients[name] = each
        training.require_finite(step, {"loss": loss}, finite, loss)
        self.reported = {name: each.nan_to_num() for name, each in self.reported.items()}


@fault(caught_by="accumulation", kind="structural", source="one generator for all microbatches")
class DrawnByPlace(CycleTrainer):
    """Noise is that of an example's place in its microbatch."""

    def drawn(self, latents, key, noise, times):
        return super().drawn(latents, {**key, "example": torch.arange(len(latents))}, noise, times)


@fault(caught_by="accumulation", kind="structural", source="loss / accumulation_steps; Unsloth 2024, transformers#34191")
class MeanOfMeans(CycleTrainer):
    """Microbatches count alike, whatever they hold."""

    def share(self, losses, batch_size):
        return losses.mean() / min(self.config.accumulation_steps, batch_size)
