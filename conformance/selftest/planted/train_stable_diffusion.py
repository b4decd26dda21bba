"""Bugs of trainers of Stable Diffusion."""

from dataclasses import replace

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.train_stable_diffusion import StableTrainer
from gaugeblock.reference import purposes


@fault(caught_by="parity", kind="structural", source="latents * vae.config.scaling_factor forgotten")
class LatentsNotScaled(StableTrainer):
    """Latents are as the encoder makes them."""

    def scale(self):
        return 1.0


@fault(caught_by="parity", kind="structural", source="latent_dist.mode() for latent_dist.sample(); maxdiffusion's Flux")
class LatentsAreTheMode(StableTrainer):
    """Latents are the encoder's means."""

    def posterior(self, mean, logvar, noise):
        return mean


@fault(caught_by="parity", kind="structural", source="exp(logvar) for exp(logvar / 2)")
class VarianceForDeviation(StableTrainer):
    """Latents are drawn with the variance in place of its root."""

    def posterior(self, mean, logvar, noise):
        return mean + logvar.exp() * noise


@fault(caught_by="parity", kind="structural", source="one generator key for both: maxdiffusion, which splits it")
class LatentsDrawnAsTheNoise(StableTrainer):
    """The noise of the latents is that which is to be predicted."""

    def purpose_of_latents(self):
        return purposes.TRAINING_NOISE


@fault(caught_by="parity", kind="state", source="latents cached once; SDXL's example asks for it, SD's does not")
class LatentsDrawnOnce(StableTrainer):
    """Latents are drawn by the example alone, not anew in each step."""

    def latents(self, images, key):
        return super().latents(images, {**key, "step": 0})


@fault(caught_by="parity", kind="structural", source="noise_offset added after the target was kept")
class OffsetNotInTheTarget(StableTrainer):
    """The target is the noise without its offset."""

    def target(self, latents, noise, offset, more, remaining):
        return super().target(latents, noise - offset, offset, more, remaining)


@fault(caught_by="parity", kind="structural", source="torch.randn((B, 1, 1, 1)) for (B, C, 1, 1)")
class OffsetOfTheImage(StableTrainer):
    """All channels of an image have the same offset."""

    def offset_shape(self, latents):
        return (1, 1, 1)


@fault(caught_by="parity", kind="structural", source="target = new_noise; Ning et al. (arXiv:2301.11706) predict the unperturbed")
class PerturbationInTheTarget(StableTrainer):
    """The perturbed noise is to be predicted."""

    def target(self, latents, noise, offset, more, remaining):
        return super().target(latents, noise + self.config.input_perturbation * more, offset, more, remaining)


@fault(caught_by="parity", kind="structural", source="Salimans and Ho (arXiv:2202.00512), the sign of v")
class VelocityOfTheOtherSign(StableTrainer):
    """A velocity points to the data."""

    def target(self, latents, noise, offset, more, remaining):
        target = super().target(latents, noise, offset, more, remaining)
        return -target if self.config.schedule.prediction_type == "v_prediction" else target


@fault(caught_by="parity", kind="structural", source="get_velocity not called: target = noise whatever prediction_type says")
class NoiseWhateverIsPredicted(StableTrainer):
    """The target is the noise."""

    def target(self, latents, noise, offset, more, remaining):
        return noise


@fault(caught_by="parity", kind="structural", source="diffusers' train_text_to_image_sdxl.py: model_pred - noise for 'sample'")
class NoiseTakenFromTheSample(StableTrainer):
    """The noise is subtracted from a predicted sample."""

    def output(self, predicted, noise):
        return predicted - noise if self.config.schedule.prediction_type == "sample" else predicted


@fault(caught_by="parity", kind="structural", source="diffusers' train_text_to_image.py, before min(snr, gamma) / (snr + 1)")
class VelocityWeightsOfNoise(StableTrainer):
    """Velocities weigh as noise does."""

    def min_snr(self, ratio, gamma):
        return (gamma / ratio).clamp(max=1) if self.config.schedule.prediction_type != "sample" else super().min_snr(ratio, gamma)


@fault(caught_by="parity", kind="structural", source="EasyDeL: noise / data")
class RatioInverted(StableTrainer):
    """Weights are of noise over data."""

    def min_snr(self, ratio, gamma):
        return super().min_snr(1 / ratio, gamma)


@fault(caught_by="parity", kind="structural", source="snr = alphas_cumprod.sqrt() / (1 - alphas_cumprod).sqrt(), not squared")
class RatioNotSquared(StableTrainer):
    """Weights are of amplitudes."""

    def min_snr(self, ratio, gamma):
        return super().min_snr(ratio.sqrt(), gamma)


@fault(caught_by="parity", kind="structural", source="EasyDeL: loss.mean() before the weights")
class MeanBeforeTheWeights(StableTrainer):
    """Each weight multiplies the mean over the batch."""

    def weighted(self, losses, weights):
        return losses.mean() * weights


@fault(caught_by="parity", kind="structural", source="maxdiffusion: the first T - floor(p T) for the first floor(p T)")
class MostAreEarlier(StableTrainer):
    """All timesteps but the last portion are drawn more often."""

    def frequencies(self):
        config = self.config
        if config.timestep_bias == "earlier":
            self.config = replace(config, bias_portion=1 - config.bias_portion)
        frequencies = super().frequencies()
        self.config = config
        return frequencies


@fault(caught_by="parity", kind="boundary", source="timesteps counted from 1")
class OneTimestepBefore(StableTrainer):
    """Timesteps are those before the ones drawn."""

    def timesteps(self, key):
        return (super().timesteps(key) - 1).clamp(min=0)


@fault(caught_by="parity", kind="structural", source="a scheduler of DDPM's defaults, beta_schedule='linear'")
class BetasAreLinear(StableTrainer):
    """Betas rise in a line, not their roots."""

    def betas(self, first, last, count):
        return torch.linspace(first, last, count, dtype=torch.float64)


@fault(caught_by="parity", kind="structural", source="rescale_betas_zero_snr in the config of the sampler alone")
class SomethingLeftAtTheEnd(StableTrainer):
    """Tables are not rescaled."""

    def rescaled(self, remaining):
        return remaining


@fault(caught_by="parity", kind="structural", source="timesteps / num_train_timesteps, as flows are told")
class TimestepsInUnits(StableTrainer):
    """The UNet is told times in [0, 1)."""

    def told_timesteps(self, timesteps):
        return super().told_timesteps(timesteps) / self.config.schedule.num_train_timesteps


@fault(caught_by="parity", kind="gradient", source="train_text_encoder=True under torch.no_grad()")
class TextEncodersGetNoGradients(StableTrainer):
    """Captions are encoded without gradients, also where the encoders are trained."""

    def encoded(self, own, input_ids, encoder):
        hidden, pooled = super().encoded(own, input_ids, encoder)
        return hidden.detach(), pooled.detach()


@fault(caught_by="parity", kind="gradient", source="the pooled result computed apart, under torch.no_grad()")
class PooledGetsNoGradients(StableTrainer):
    """Hidden states pass gradients on, the pooled result does not."""

    def encoded(self, own, input_ids, encoder):
        hidden, pooled = super().encoded(own, input_ids, encoder)
        return hidden, pooled.detach()


@fault(caught_by="parity", kind="structural", source="clip_grad_norm_(unet.parameters()) alone")
class TextEncodersNotClipped(StableTrainer):
    """Gradients of the text encoders are left as they are."""

    def clip(self, gradients, norm):
        clipped = super().clip(gradients, norm)
        return {name: each if name.startswith("unet.") else gradients[name] for name, each in clipped.items()}


@fault(caught_by="parity", kind="structural", source="hidden_states[-1] for hidden_states[-2]")
class LastLayerOfXL(StableTrainer):
    """Hidden states are those of the last layer."""

    def encoded(self, own, input_ids, encoder):
        return super().encoded(own, input_ids, replace(encoder, returned_layer=-1))


@fault(caught_by="parity", kind="structural", source="clip_skip with the final LayerNorm kept")
class HiddenStatesNormalized(StableTrainer):
    """The final LayerNorm is applied to hidden states, as of Stable Diffusion 1."""

    def encoded(self, own, input_ids, encoder):
        return super().encoded(own, input_ids, replace(encoder, normalize_returned=True))


@fault(caught_by="parity", kind="structural", source="pooled_prompt_embeds kept of the first turn of a loop over encoders")
class PooledOfTheFirstEncoder(StableTrainer):
    """The pooled result is the first encoder's."""

    def texts(self, parameters, input_ids):
        hidden, _ = super().texts(parameters, input_ids)
        first, config = self.config.text_encoders[0], self.config
        self.config = replace(config, text_encoders=(first,) * len(config.text_encoders))
        own = {name: each for name, each in {**self.frozen, **parameters}.items() if name.startswith("text_encoder.")}
        _, pooled = self.encoded({name.partition(".")[2]: each for name, each in own.items()}, input_ids[:, 0], first)
        self.config = config
        return hidden, pooled


@fault(caught_by="parity", kind="structural", source="one tokenizer for both encoders")
class OneTokenizerForBoth(StableTrainer):
    """Both encoders are given the first one's ids."""

    def place(self, place):
        return 0

    def encoded(self, own, input_ids, encoder):
        input_ids = input_ids.clone()
        input_ids[:, -1] = 5  # so that captions end
        return super().encoded(own, input_ids, encoder)


@fault(caught_by="parity", kind="structural", source="torch.cat([prompt_embeds_2, prompt_embeds_1])")
class EncodersExchanged(StableTrainer):
    """The second encoder's hidden states come first."""

    def texts(self, parameters, input_ids):
        hidden, pooled = super().texts(parameters, input_ids)
        return hidden.roll(self.config.text_encoders[0].hidden_size, dims=-1), pooled


@fault(caught_by="parity", kind="structural", source="(width, height) for (height, width)")
class WidthBeforeHeight(StableTrainer):
    """The first two of the numbers are exchanged."""

    def time_ids(self, time_ids):
        return time_ids[:, [1, 0, *range(2, time_ids.shape[1])]]


@fault(caught_by="parity", kind="structural", source="maxdiffusion: sizes of the crop whatever the image's were")
class NumbersOfTheFirstExample(StableTrainer):
    """All images are told the sizes of the first."""

    def time_ids(self, time_ids):
        return time_ids[:1].expand_as(time_ids)


@fault(caught_by="parity", kind="structural", source="only prompt_embeds zeroed")
class PooledNotDropped(StableTrainer):
    """Of a dropped text the pooled result is told."""

    def drop(self, hidden, pooled, kept):
        return super().drop(hidden, pooled, kept)[0], pooled


@fault(caught_by="accumulation", kind="structural", source="the frozen encoders' key split for each microbatch")
class LatentsDrawnByMicrobatch(StableTrainer):
    """The noise of latents is that of an example's place in its microbatch."""

    def latents(self, images, key):
        return super().latents(images, {**key, "example": torch.arange(len(images))})


@fault(caught_by="parity", kind="structural", source="ema.step() before optimizer.step()")
class AverageOfTheLastWeights(StableTrainer):
    """The average takes in the parameters that were there before the update."""

    def averaged(self, before, after):
        return before


@fault(caught_by="inputs_unchanged", kind="memory", source="vae.parameters() updated by weight decay of a joint optimizer")
class FrozenDecays(StableTrainer):
    """What is frozen is multiplied by what weight decay leaves."""

    def update(self, state, gradients):
        for each in self.frozen.values():
            each.mul_(1 - self.config.learning_rate * self.config.weight_decay)
        return super().update(state, gradients)
