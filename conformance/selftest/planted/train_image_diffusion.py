"""Bugs of trainers of image diffusion: draws, targets, losses, and what the model is told."""

from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.train_image_diffusion import Trainer, TrainerOnTexts
from gaugeblock.reference import purposes
from gaugeblock.reference.torch import random


@fault(caught_by="parity", kind="structural", source="EasyDeL review", smallest=2)
class OneKeyForTheBatch(Trainer):
    """All examples of a batch get the noise of the first."""

    def noise(self, images, example_ids, key):
        return super().noise(images, example_ids[:1].expand_as(example_ids), key)


@fault(caught_by="permutation_equivariance", kind="structural", source="torch.randn_like(images)")
class DrawsByPlace(Trainer):
    """An example's draws depend on its place in the batch."""

    def ids(self, example_ids):
        return torch.arange(len(example_ids))


@fault(caught_by="accumulation", kind="structural", source="EasyDeL review")
class KeysReusedOverMicrobatches(Trainer):
    """An example's draws are those of its neighbour at the same place of the first microbatch."""

    def gradients(self, parameters, images, labels, example_ids, step):
        first = len(self.microbatches(len(images))[0])
        return super().gradients(parameters, images, labels, example_ids[torch.arange(len(images)) % first], step)


@fault(caught_by="parity", kind="structural")
class LabelDropoutOncePerBatch(Trainer):
    """Either all labels of a batch are dropped, or none."""

    def drop(self, labels, example_ids, key):
        return super().drop(labels, example_ids[:1].expand_as(example_ids), key)


@fault(caught_by="parity", kind="structural", source="one generator for all draws of a step")
class DropoutByTheTimesNumbers(Trainer):
    """Labels are dropped at late times: both have the same numbers."""

    def drop(self, labels, example_ids, key):
        return torch.where(self.times(example_ids, key) < self.config.label_dropout, self.null_label(), labels.long())


@fault(caught_by="parity", kind="structural", source="class 0 as the null class")
class DroppedLabelIsZero(Trainer):
    """A dropped label is an example of the first class."""

    def null_label(self):
        return 0


@fault(caught_by="resume", kind="state", source="generators seeded when a run starts")
class ResumedDrawsStartAgain(Trainer):
    """Draws are counted from when the process started."""

    def __init__(self):
        self.calls = 0

    def step_of_draws(self, step):
        self.calls += 1
        return self.calls


@fault(caught_by="process_settings", kind="state", source="torch.manual_seed(seed + step) in the loop")
class SeedsTheProcess(Trainer):
    """The process' generator is seeded in each step."""

    def losses(self, parameters, images, labels, example_ids, step):
        torch.manual_seed(self.config.seed + step)
        return super().losses(parameters, images, labels, example_ids, step)


@fault(caught_by="determinism", kind="state", source="torch.randn without a generator")
class NoiseOfTheProcess(Trainer):
    """Noise is drawn from wherever the process' generator stands."""

    def noise(self, images, example_ids, key):
        return torch.randn_like(images)


@fault(caught_by="parity", kind="boundary", source="seeds cut to 32 bits")
class SeedInThirtyTwoBits(Trainer):
    """The high half of the seed is lost."""

    def noise(self, images, example_ids, key):
        return super().noise(images, example_ids, {**key, "seed": key["seed"] % 2**32})


@fault(caught_by="parity", kind="structural", source="EasyDeL, SD3")
class VelocitySignIgnored(Trainer):
    """The model learns noise − data, whatever is asked for."""

    def velocity(self, images, noise):
        return noise - images


@fault(caught_by="parity", kind="structural", source="rectified flow's two conventions of time")
class TimeReversed(Trainer):
    """Data lie at time 1."""

    def interpolate(self, images, noise, times):
        return super().interpolate(images, noise, 1 - times)


@fault(caught_by="parity", kind="structural", source="Flux-dev: × 1000 missing")
class TimesNotScaled(Trainer):
    """The model is told times in [0, 1)."""

    def timesteps(self, times):
        return times


@fault(caught_by="parity", kind="precision", source="DDPM's integer timesteps")
class TimesTruncated(Trainer):
    """The model is told whole numbers."""

    def timesteps(self, times):
        return super().timesteps(times).floor()


@fault(caught_by="parity", kind="structural")
class SamplingOfTimesIgnored(Trainer):
    """Times are uniform, whatever is asked for."""

    def times(self, example_ids, key):
        return random.uniform((), **key, example=example_ids, purpose=purposes.TRAINING_TIMES)


@fault(caught_by="parity", kind="structural")
class LossSummed(Trainer):
    """The loss is the sum over the examples."""

    def share(self, losses, batch_size):
        return losses.sum()


@fault(caught_by="parity", kind="structural", source="EasyDeL: inverted for data at time 0")
class SignalAndNoiseExchanged(Trainer):
    """Examples with more noise weigh as those with less should."""

    def ratio(self, of_data, of_noise):
        return super().ratio(of_noise, of_data)


@fault(caught_by="parity", kind="structural", source="min-SNR of epsilon for every prediction")
class WeightsOfEpsilonForAll(Trainer):
    """Whatever is predicted is weighted as noise is."""

    def weights(self, times):
        config, self.config = self.config, replace(self.config, prediction_type="epsilon")
        weights = super().weights(times)
        self.config = config
        return weights


@fault(caught_by="parity", kind="structural")
class VelocityWhateverIsAsked(Trainer):
    """The prediction is taken for a velocity."""

    def target(self, images, noise):
        return self.velocity(images, noise)


@fault(caught_by="parity", kind="structural", source="maxdiffusion: the first T - floor(p T) in place of the first floor(p T)")
class EarlierAndLaterExchanged(Trainer):
    """Of times that are biased the wrong ones are drawn more often."""

    def times(self, example_ids, key):
        config = self.config
        if config.timestep_sampling in ("earlier", "later"):
            self.config = replace(config, timestep_sampling="earlier" if config.timestep_sampling == "later" else "later")
        times = super().times(example_ids, key)
        self.config = config
        return times


@fault(caught_by="parity", kind="state", source="guided-diffusion#167, OLMo-core#828")
class RecomputedWithOtherDraws(Trainer):
    """Where activations are recomputed, labels are dropped anew: those of the backward pass are others."""

    def predict(self, parameters, noised, timesteps, labels):
        if not self.config.activation_checkpointing:
            return super().predict(parameters, noised, timesteps, labels)
        runs = []

        def run(noised):
            runs.append(labels)
            return super(RecomputedWithOtherDraws, self).predict(parameters, noised, timesteps, labels.roll(len(runs) - 1))

        return checkpoint(run, noised, use_reentrant=False)


@fault(caught_by="parity", kind="structural", source="pooled projections of the unconditional prompt forgotten")
class PooledTextNotDropped(TrainerOnTexts):
    """Where the text is dropped, the pooled one is told nevertheless."""

    def dropped_pooled(self, pooled, kept):
        return pooled


@fault(caught_by="parity", kind="structural", source="dropout scaled as torch.nn.Dropout scales")
class KeptTextsScaledUp(TrainerOnTexts):
    """Texts that are kept are divided by the share of those that are."""

    def dropped(self, texts, kept):
        return texts * kept / max(1 - self.config.label_dropout, 0.1)


@fault(caught_by="parity", kind="structural", source="text embeddings not sliced with the microbatch")
class TextsOfTheFirstMicrobatch(TrainerOnTexts):
    """Every microbatch is told the texts of the first one."""

    def drop(self, labels, example_ids, key):
        return super().drop(labels - labels[0], example_ids, key)


@fault(caught_by="parity", kind="structural", source="weight decay of buffers that are registered as parameters")
class TableOfPositionsDecays(TrainerOnTexts):
    """What is not trained loses weight as what is."""

    def update(self, state, gradients):
        new = super().update(state, gradients)
        for name in self.frozen():
            kept = 1 - self.rate(int(new["step"])) * self.config.weight_decay
            new[f"model.{name}"] = new[f"model.{name}"] * kept
        return new
