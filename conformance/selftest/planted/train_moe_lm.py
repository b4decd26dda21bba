"""Bugs of trainers of mixtures of experts: losses of routers, their noise, experts without tokens."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from gaugeblock.conformance.selftest.edits import mutant
from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.train_moe_lm import MoELMTrainer
from gaugeblock.reference.configs import IGNORED_LABEL
from gaugeblock.reference.torch import upcycled_gpt2


@fault(caught_by="parity", kind="structural", source="labels shifted by the data loader and by the model")
class NotShifted(MoELMTrainer):
    """Each token predicts itself."""

    def shifted(self, logits, labels):
        return logits, labels


@fault(caught_by="parity", kind="structural", source="labels shifted twice")
class ShiftedTwice(MoELMTrainer):
    """Each token predicts the second one after it."""

    def shifted(self, logits, labels):
        return (logits[:, :-2], labels[:, 2:]) if labels.shape[1] > 2 else super().shifted(logits, labels)


@fault(caught_by="parity", kind="boundary", source="losses divided by batch_size * num_tokens")
class IgnoredLabelsCount(MoELMTrainer):
    """Labels that do not count are counted where the sum is divided."""

    def lm_loss(self, logits, labels):
        logits, labels = self.shifted(logits, labels)
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum") / labels.numel()


@fault(caught_by="parity", kind="structural", source="transformers' 2024 fix: means of sequences")
class MeanOfSequences(MoELMTrainer):
    """Sequences count alike, however many labels they have."""

    def lm_loss(self, logits, labels):
        logits, labels = self.shifted(logits, labels)
        losses = cross_entropy(logits.mT, labels, ignore_index=IGNORED_LABEL, reduction="none")
        return (losses.sum(1) / (labels != IGNORED_LABEL).sum(1).clamp(min=1)).mean()


@fault(caught_by="parity", kind="structural", source="set_noise_annealing called, router.step forgotten")
class NoiseNotAnnealed(MoELMTrainer):
    """Noise is as wide in every step."""

    def std(self, step):
        return self.config.noise_std if self.noised_steps() else 0.0


@fault(caught_by="parity", kind="structural")
class AnnealedOverTheWholeRun(MoELMTrainer):
    """The fraction that has noise is all."""

    def noised_steps(self):
        return self.config.num_training_steps or 0


@fault(caught_by="parity", kind="boundary", source="the counter stepped before the forward pass")
class AnnealedOneStepAhead(MoELMTrainer):
    """Noise is that of the next step."""

    def std(self, step):
        return super().std(step + 1)


@fault(caught_by="resume", kind="state", source="moe-emergence: the data's place is not saved, training_step is")
class NoiseCountedByTheProcess(MoELMTrainer):
    """Noise falls with the calls of this process."""

    def __init__(self):
        self.calls = 0

    def std(self, step):
        self.calls += 1
        return super().std(400 * self.calls)


@fault(caught_by="permutation_equivariance", kind="structural", source="torch.randn_like(router_logits)")
class NoiseByPlace(MoELMTrainer):
    """An example's noise depends on its place in the batch."""

    def ids(self, example_ids):
        return torch.arange(len(example_ids))


@fault(caught_by="determinism", kind="state", source="torch.randn without a generator")
class NoiseOfTheProcess(MoELMTrainer):
    """Noise is drawn from wherever the process' generator stands."""

    def normals(self, ids, shape, step):
        return torch.randn(len(ids), *shape)


@fault(caught_by="parity", kind="structural", source="keys without the layer")
class OneNoiseForAllLayers(MoELMTrainer):
    """All layers have the noise of the first."""

    def noise(self, ids, num_tokens, step):
        drawn = super().noise(ids, num_tokens, step)
        return drawn[:, :, :1].expand_as(drawn)


@fault(caught_by="parity", kind="structural", source="wrappers that are in evaluation mode after loading")
class RoutersInEvaluation(MoELMTrainer):
    """There is neither noise nor a gradient of one expert's weight."""

    def outputs(self, parameters, input_ids, noise):
        return upcycled_gpt2.upcycled_gpt2(parameters, input_ids, noise, training=False, config=self.model)


@fault(caught_by="parity", kind="structural", source="auxiliary losses added up over the layers")
class LossesSummedOverLayers(MoELMTrainer):
    """A model with more layers weighs its routers more."""

    def over_layers(self, losses):
        return losses.sum()


@fault(caught_by="parity", kind="structural", source="last_aux of the last layer alone")
class LossesOfTheLastLayer(MoELMTrainer):
    """The other layers' losses are overwritten."""

    def over_layers(self, losses):
        return losses[-1]


@fault(caught_by="parity", kind="structural", source="transformers' load_balancing_loss_func divides by tokens")
class BalanceTimesTopK(MoELMTrainer):
    """Assignments are divided by tokens."""

    def balance(self, probs, load):
        return self.model.top_k * super().balance(probs, load)


@fault(caught_by="parity", kind="structural", source="a balance loss without num_experts")
class BalanceNotScaled(MoELMTrainer):
    """Even loads have a loss of 1 / num_experts."""

    def balance(self, probs, load):
        return super().balance(probs, load) / probs.shape[-1]


@fault(caught_by="parity", kind="structural", source="probabilities of the forward pass forgotten")
class BalanceWithoutNoise(MoELMTrainer):
    """The balance loss is of probabilities without noise."""

    def probabilities(self, probs, router_logits):
        return router_logits.softmax(-1)


@fault(caught_by="parity", kind="gradient", source="EasyDeL, pull request 231: a loss that is reported alone")
class BalanceHasNoGradient(MoELMTrainer):
    """The balance loss is added, and nothing flows back."""

    def probabilities(self, probs, router_logits):
        return probs.detach()


@fault(caught_by="parity", kind="structural", source="ST-MoE's z-loss of what the softmax gets")
class ZOfNoisyLogits(MoELMTrainer):
    """The z-loss is of logits with noise."""

    def of_z(self, router_logits, noise):
        return router_logits + noise


@fault(caught_by="parity", kind="structural")
class ZNotSquared(MoELMTrainer):
    """The z-loss is the mean of logsumexp."""

    def z(self, router_logits):
        return router_logits.logsumexp(-1)


@fault(caught_by="parity", kind="structural")
class CoefficientsExchanged(MoELMTrainer):
    """Each loss has the coefficient of the other."""

    def objective(self, lm_loss, balance, z_loss):
        return super().objective(lm_loss, z_loss, balance)


@fault(caught_by="parity", kind="structural", source="entropy of mean probabilities, which is that of the load")
class EntropyOfTheMean(MoELMTrainer):
    """The entropy is that of the mean probabilities."""

    def entropy(self, entropy, router_logits):
        mean = router_logits.softmax(-1).mean((0, 1))
        return -(mean * mean.log()).sum(-1)


@fault(caught_by="parity", kind="structural", source="optax: gradients of zeros for experts that are not used")
class IdleExpertsMove(MoELMTrainer):
    """Experts without tokens decay, and go on with their moments."""

    def used(self, load):
        return {name: torch.ones_like(each) for name, each in super().used(load).items()}


@fault(caught_by="parity", kind="structural", source="decay applied to all parameters before the update")
class IdleExpertsDecay(MoELMTrainer):
    """Experts without tokens lose what weight decay takes."""

    def update_idle(self, parts, name, step):
        parts["model"][name] = (1 - self.rate(step) * 2 * self.config.weight_decay) * parts["model"][name]


@fault(caught_by="parity", kind="structural", source="moments of stacked parameters in one array")
class IdleMomentsFade(MoELMTrainer):
    """Moments of experts without tokens are averaged with 0."""

    def update_idle(self, parts, name, step):
        for part, each in parts.items():
            if part != "model":
                each[name] = each[name] * self.config.beta1


@fault(caught_by="parity", kind="structural", source="one step for a stacked parameter")
class CorrectedByTheRunsStep(MoELMTrainer):
    """Moments of experts are corrected by the number of steps, not of their updates."""

    def step_of_expert(self, count):
        return self.now


@fault(caught_by="parity", kind="structural")
class IdleExpertsCounted(MoELMTrainer):
    """Experts without tokens count the step as an update."""

    def counted(self, counts, idle):
        return counts + 1


@fault(caught_by="parity", kind="structural", source="one mask for all layers")
class UsedInTheFirstLayer(MoELMTrainer):
    """Experts are updated where those of the first layer had tokens."""

    def layer_of_names(self, count):
        return [0] * count


@fault(caught_by="parity", kind="structural", source="the learning rate from the optimizer's step of each parameter")
class RateByTheExpertsStep(MoELMTrainer):
    """The learning rate of experts is that of their own number of updates."""

    def rate(self, step):
        now, self.now = self.now, step
        rate = super().rate(step)
        self.now = now
        return rate


STEP = "train_moe_lm.train_step"
SHARDED: dict[str, Any] = {"implementation": "fsdp2", "batch_invariant": False}
OF_JAX: dict[str, Any] = {"implementation": "jax-sharded", "batch_invariant": False}

mutant(
    STEP, "load-of-own-examples", "The balance loss has the load of the rank's own examples.", "train_moe_lm.ShardedTrainer",
    "sum_over_ranks(outputs[4].double().sum(dim=0), group) / of_microbatches[index]",
    "outputs[4].double().sum(dim=0) / max(1, len(ids))", "world_size", "structural",
    "an auxiliary loss under data parallelism", **SHARDED,
)  # fmt: skip
mutant(
    STEP, "mean-of-ranks", "Each rank divides by its own labels, and the ranks' means are added up as means.",
    "train_moe_lm.ShardedTrainer", "sum_over_ranks(counts_BS.sum()[None], group)",
    "(counts_BS.sum().clamp(min=1) * self.run.mesh.size())", "world_size", "structural", "transformers' 2024 fix, over ranks",
    **SHARDED,
)  # fmt: skip
mutant(
    STEP, "first-rows-everywhere", "Each rank takes the first experts' marks for those of its own experts.",
    "training.ShardedRun", "own = {name: local_part(each) for name, each in used.items()}",
    "own = {name: each.full_tensor()[: len(local_part(each))] for name, each in used.items()}", "world_size", "structural",
    **SHARDED,
)  # fmt: skip
mutant(
    STEP, "padding-in-the-load", "Tokens of padding count in the load of experts.", "train_moe_lm.shares",
    "jnp.where(counts[:, None, None], outputs[4], 0).sum(axis=0)", "outputs[4].sum(axis=0)", "world_size", "boundary",
    "batches padded to a multiple of the devices", **OF_JAX,
)  # fmt: skip
mutant(
    STEP, "idle-experts-move-on-ranks", "Every expert is updated as if it had had tokens.", "train_moe_lm.train_step",
    ", rows_used=reference.experts_used", "", "parity", "structural", "optax: gradients of zeros", **OF_JAX,
)  # fmt: skip
