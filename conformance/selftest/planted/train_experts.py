"""Bugs of trainers of mixtures of experts: what the balance of the load is of, and how often it counts."""

from typing import Any

import torch

from gaugeblock.conformance.selftest.edits import mutant
from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.train_image_diffusion import TrainerOfExperts

STEP = "train_image_diffusion.train_step_of_experts"
SHARDED: dict[str, Any] = {"implementation": "fsdp2", "batch_invariant": False}
OF_JAX: dict[str, Any] = {"implementation": "jax-sharded", "batch_invariant": False, "sharding": "without_padding"}
OF_RANK = "weight * (value / self.run.mesh.size() + auxiliary_loss - value)"


@fault(caught_by="parity", kind="structural", source="router losses that the model returns and the trainer leaves")
class BalanceDropped(TrainerOfExperts):
    """The model's second result is left alone."""

    def predict(self, parameters, noised, timesteps, labels):
        predicted = super().predict(parameters, noised, timesteps, labels)
        self.balance = 0 * self.balance
        return predicted


@fault(caught_by="parity", kind="gradient", source="auxiliary losses detached for logging")
class BalanceWithoutGradient(TrainerOfExperts):
    """The balance is reported, and nothing flows back."""

    def objective(self, loss, balance):
        return super().objective(loss, balance.detach())


@fault(caught_by="parity", kind="structural", source="one loss for what is learned and what is logged")
class BalanceInTheLoss(TrainerOfExperts):
    """The loss that is reported has the balance in it."""

    def reported(self, loss, balance):
        return loss + balance, balance


@fault(caught_by="parity", kind="structural")
class BalanceOverTheExamples(TrainerOfExperts):
    """The balance is divided by the number of examples, as the sum of their losses is."""

    def share(self, losses, batch_size):
        self.balance = self.balance / batch_size
        return super().share(losses, batch_size)


@fault(caught_by="parity", kind="structural", source="a second forward pass for the router's losses")
class BalanceOfLabelsBeforeDropout(TrainerOfExperts):
    """The balance is that of tokens which know all labels."""

    def drop(self, labels, example_ids, key):
        self.labels = labels
        return super().drop(labels, example_ids, key)

    def predict_both(self, parameters, noised, timesteps, labels):
        predicted, _ = super().predict_both(parameters, noised, timesteps, labels)
        return predicted, super().predict_both(parameters, noised, timesteps, self.labels)[1]


@fault(caught_by="parity", kind="structural", source="microbatches within the model")
class BalanceOfHalves(TrainerOfExperts):
    """The model sees half a batch at a time, and the balance is the halves' mean."""

    def predict_both(self, parameters, noised, timesteps, labels):
        halves = zip(*(each.tensor_split(min(2, len(each))) for each in (noised, timesteps, labels)), strict=True)
        parts, balances = zip(*(super(BalanceOfHalves, self).predict_both(parameters, *each) for each in halves), strict=True)
        return torch.cat(parts), torch.stack(balances).mean()


@fault(
    caught_by="parity", kind="precision", source="feizc/DiT-MoE: a gradient of 1 on the way back, whatever the scale of the loss"
)
class BalanceNotScaled(TrainerOfExperts):
    """The scale of the loss is taken out of the balance's gradient, too, which never had it."""

    def objective(self, loss, balance):
        return super().objective(loss, balance / self.config.loss_scale)


mutant(
    STEP, "balance-of-own-examples", "The balance is that of the rank's own examples.",
    "fully_sharded_models._predict_dit_moe", '| {"balance_loss": loss}', '| {"balance_loss": OF_MOE.balance_loss}', "world_size",
    "structural", "an auxiliary loss under data parallelism", **SHARDED,
)  # fmt: skip
mutant(
    STEP, "balance-once-a-rank", "Every rank reports the whole balance, and they are added up.",
    "train_image_diffusion.ShardedTrainer", OF_RANK, "weight * auxiliary_loss", "world_size", "structural",
    "an auxiliary loss that all ranks have, summed", **SHARDED,
)  # fmt: skip
mutant(
    STEP, "balance-a-part-of-its-gradient", "What is differentiated of the balance is a rank's part.",
    "train_image_diffusion.ShardedTrainer", OF_RANK, "weight * auxiliary_loss / self.run.mesh.size()", "world_size", "gradient",
    "an auxiliary loss averaged over ranks", **SHARDED,
)  # fmt: skip
mutant(
    STEP, "balance-weighs-as-the-rank", "The balance of all weighs as much as the rank has examples.",
    "train_image_diffusion.ShardedTrainer", "of_microbatches[index] / sum(batch_sizes)", "len(images) / sum(batch_sizes)",
    "world_size", "structural", **SHARDED,
)  # fmt: skip
mutant(
    STEP, "balance-not-learned", "The balance is reported and not differentiated.", "train_image_diffusion.shares",
    "loss + auxiliary_loss, {", "loss, {", "parity", "gradient", **OF_JAX,
)  # fmt: skip
