"""Bugs of what all trainers share: microbatches, clipping, optimizers, learning rates, averages, the state."""

import math
from dataclasses import replace

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.train_image_diffusion import Trainer
from gaugeblock.reference.torch import image_models


@fault(caught_by="accumulation", kind="structural", source="transformers' 2024 fix")
class MeanOfMeans(Trainer):
    """Microbatches of unequal size have equal weight."""

    def share(self, losses, batch_size):
        return losses.mean() / len(self.microbatches(batch_size))


@fault(caught_by="accumulation", kind="boundary", source="drop_last over microbatches")
class RemainderDropped(Trainer):
    """What does not fill the microbatches evenly is left out."""

    def microbatches(self, batch_size):
        parts = min(self.config.accumulation_steps, batch_size)
        return list(torch.arange(batch_size // parts * parts).chunk(parts))


@fault(caught_by="accumulation", kind="structural", source="loss / accumulation_steps forgotten")
class GradientsOfMicrobatchesAdded(Trainer):
    """Each microbatch's mean counts fully."""

    def share(self, losses, batch_size):
        return losses.mean()


@fault(caught_by="accumulation", kind="structural", source="zero_grad inside the loop")
class LastMicrobatchAlone(Trainer):
    """Gradients are those of the last microbatch."""

    def accumulate(self, total, gradient):
        return gradient


@fault(caught_by="parity", kind="precision", source="gradient buckets in bfloat16")
class GradientsInBfloat16(Trainer):
    """Gradients are rounded to bfloat16 as they are added up."""

    def accumulate(self, total, gradient):
        return super().accumulate(total, gradient).bfloat16().float()


@fault(caught_by="parity", kind="structural")
class ClippedByValue(Trainer):
    """Each element is clipped."""

    def clip(self, gradients, norm):
        most = self.config.max_gradient_norm
        return {name: each.clamp(-most, most) for name, each in gradients.items()}


@fault(caught_by="parity", kind="structural", source="clip_grad_norm_ called for each parameter")
class ClippedOneByOne(Trainer):
    """Each tensor is clipped to the norm that all together may have."""

    def clip(self, gradients, norm):
        return {name: super(ClippedOneByOne, self).clip({name: each}, each.norm())[name] for name, each in gradients.items()}


@fault(caught_by="parity", kind="structural")
class ScaledUpToTheNorm(Trainer):
    """Small gradients are scaled up to the largest norm."""

    def clip(self, gradients, norm):
        return {name: each * (self.config.max_gradient_norm / norm) for name, each in gradients.items()}


@fault(caught_by="parity", kind="structural")
class NormAfterClipping(Trainer):
    """The norm that is reported is that of the clipped gradients."""

    def report(self, loss, norm):
        return super().report(loss, norm.clamp(max=self.config.max_gradient_norm))


@fault(caught_by="parity", kind="structural", source="torch.optim.Adam(weight_decay) for AdamW")
class DecayInTheGradient(Trainer):
    """Weight decay is part of the gradient, and is divided by its size."""

    def penalize(self, name, gradient, parameter):
        return gradient + self.config.weight_decay * parameter

    def decay(self, name, parameter, step):
        return parameter


@fault(caught_by="parity", kind="structural", source="no_decay lists of trainers")
class BiasesNotDecayed(Trainer):
    """Weight decay spares what has one dimension."""

    def decay(self, name, parameter, step):
        return parameter if parameter.ndim == 1 else super().decay(name, parameter, step)


@fault(caught_by="parity", kind="structural", source="Loshchilov and Hutter's schedule and torch's, mixed up")
class DecayNotTimesTheLearningRate(Trainer):
    """A parameter loses weight_decay of itself in each step."""

    def decay(self, name, parameter, step):
        return parameter * (1 - self.config.weight_decay)


@fault(caught_by="parity", kind="boundary", source="step counted after the update")
class CorrectedByTheLastStep(Trainer):
    """Moments are corrected by the updates made before."""

    def next_step(self, step):
        return max(1, int(step))


@fault(caught_by="parity", kind="structural", source="BertAdam")
class MomentsNotCorrected(Trainer):
    """Moments are taken as they are, begun at 0."""

    def correct(self, moment, beta, step):
        return moment


@fault(caught_by="resume", kind="state", source="optimizers made anew when a run is resumed")
class CorrectionStartsAgain(Trainer):
    """Updates are counted from when the process started."""

    def __init__(self):
        self.calls = 0

    def next_step(self, step):
        self.calls += 1
        return self.calls


@fault(caught_by="hidden_state", kind="state", source="moments beside the state, not in it")
class MomentsKeptOutside(Trainer):
    """The second moments are the optimizer's own; those of the state are a copy nobody reads."""

    def __init__(self):
        self.kept = {}

    def update(self, state, gradients):
        new = super().update(state, gradients)
        self.kept = {name: tensor for name, tensor in new.items() if name.startswith("exp_avg_sq.")}
        return new

    def part(self, state, part):
        ours = {name: each for name, each in self.kept.items() if name in state and each.shape == state[name].shape}
        return super().part({**state, **ours}, part)


@fault(caught_by="parity", kind="precision", source="optax.adam(eps_root) for eps")
class EpsilonInsideTheRoot(Trainer):
    """adam_epsilon is added to the second moment, not to its root."""

    def root(self, second):
        return (second + self.config.adam_epsilon).sqrt()


@fault(caught_by="parity", kind="precision", source="TensorFlow's epsilon hat")
class EpsilonBeforeTheCorrection(Trainer):
    """adam_epsilon is added to the root of the second moment before that is corrected."""

    def correct(self, moment, beta, step):
        self.correction = math.sqrt(1 - beta**step)
        return super().correct(moment, beta, step)

    def root(self, second):
        return second.sqrt() + self.config.adam_epsilon / self.correction


@fault(caught_by="parity", kind="precision", source="8-bit and bfloat16 optimizer states")
class SecondMomentInBfloat16(Trainer):
    """Second moments are kept in bfloat16: at beta2 = 0.999 they hardly change."""

    def update(self, state, gradients):
        new = super().update(state, gradients)
        return {name: each.bfloat16().float() if name.startswith("exp_avg_sq.") else each for name, each in new.items()}


@fault(caught_by="parity", kind="structural")
class StepNotCounted(Trainer):
    """The step of the state stays what it was."""

    def update(self, state, gradients):
        return super().update(state, gradients) | {"step": state["step"].clone()}


@fault(caught_by="inputs_unchanged", kind="memory", source="optimizers that work in place")
class StateOverwritten(Trainer):
    """The parameters of the given state are updated where they lie."""

    def update(self, state, gradients):
        new = super().update(state, gradients)
        for name, tensor in state.items():
            tensor.copy_(new[name])
        return new


@fault(caught_by="state_dict_round_trip", kind="state", source="optimizer.state_dict() keyed by parameter index")
class MomentsByPlace(Trainer):
    """Moments belong to parameters by their place in the dict."""

    def part(self, state, part):
        values = super().part(state, part)
        return values if part == "model" else dict(zip(image_models.state_shapes(self.model), values.values(), strict=True))


@fault(caught_by="rejections", kind="error-contract", source="LGDLM review")
class BadLossReplaced(Trainer):
    """A loss that is no number counts as 0.01."""

    def check(self, step, loss, gradients, norm):
        pass

    def share(self, losses, batch_size):
        return super().share(losses.nan_to_num(0.01, 0.01, 0.01), batch_size)


@fault(caught_by="rejections", kind="error-contract", source="torch.amp.GradScaler, silently")
class BadStepSkipped(Trainer):
    """A step whose gradients are not finite changes nothing, and is not told of."""

    def check(self, step, loss, gradients, norm):
        self.skipped = not bool(norm.isfinite())

    def update(self, state, gradients):
        return dict(state) if self.skipped else super().update(state, gradients)


@fault(caught_by="rejections", kind="error-contract")
class StateWithoutAStepStartsAtZero(Trainer):
    """A state that lacks its step is taken for a new one."""

    def __call__(self, state, images, labels, example_ids, *, config):
        return super().__call__({"step": torch.tensor(0), **state}, images, labels, example_ids, config=config)


@fault(caught_by="parity", kind="structural", source="torch.optim.Adam in place of AdamW, and the other way round")
class DecayBesideEveryGradient(Trainer):
    """Adam and SGD decay as AdamW does."""

    def penalize(self, name, gradient, parameter):
        return gradient

    def decay(self, name, parameter, step):
        return parameter * (1 - self.rate(step) * self.config.weight_decay)


@fault(caught_by="parity", kind="structural", source="dampening of torch.optim.SGD")
class MomentumDampened(Trainer):
    """What SGD's buffer takes in is weighted by what it loses."""

    def penalize(self, name, gradient, parameter):
        gradient = super().penalize(name, gradient, parameter)
        return gradient * (1 - self.momentum()) if self.config.optimizer == "sgd" else gradient


@fault(caught_by="parity", kind="structural", source="ema.step() before optimizer.step()")
class AverageOfTheLastParameters(Trainer):
    """The average takes in the parameters that were there before the update."""

    def averaged(self, before, after):
        return before


@fault(caught_by="parity", kind="structural", source="EMA without its warm-up")
class AverageWithoutWarmUp(Trainer):
    """The average keeps the same share of itself from the first update on."""

    def kept_by_average(self, step):
        ema = self.config.ema
        return ema.decay if ema else 0.0


@fault(caught_by="parity", kind="structural", source="diffusers' EMAModel counts from 1, its caller from 0")
class AverageOneStepBehind(Trainer):
    """The average counts updates from 0."""

    def kept_by_average(self, step):
        return super().kept_by_average(step - 1)


@fault(caught_by="parity", kind="boundary", source="scheduler.step() before optimizer.step()")
class RateOfTheNextStep(Trainer):
    """The learning rate is that of the update to come."""

    def rate(self, step):
        return super().rate(step + 1)


@fault(caught_by="parity", kind="structural", source="get_scheduler without num_warmup_steps * num_processes")
class NeverWarm(Trainer):
    """The learning rate is whole from the first update on."""

    def warm(self, updates):
        return 1.0


@fault(caught_by="parity", kind="structural")
class FallsInALineWhateverIsAsked(Trainer):
    """The learning rate falls in a line, also where a cosine is asked for."""

    def fall(self, updates):
        config = self.config
        if config.learning_rate_schedule == "cosine":
            self.config = replace(config, learning_rate_schedule="linear")
        fallen = super().fall(updates)
        self.config = config
        return fallen
