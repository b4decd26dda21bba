"""Bugs of trainers of mixtures of experts: what the balance of the load is of, and how often it counts."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.train_image_diffusion import TrainerOfExperts


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
