"""Bugs of the MoE layer of DiT-MoE."""

from dataclasses import replace

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.dit_moe_layers import DitMoe
from gaugeblock.conformance.selftest.simulated.routers import GroupedRouter


@fault(caught_by="parity", kind="structural", source="EasyDeL, pull request 231: what its base class makes of the gate's logits")
class AlwaysRenormalized(DitMoe):
    """Weights are divided by their sum, whatever is asked for."""

    def weigh(self, chosen, config):
        return super().weigh(chosen, replace(config, renormalize=True))


@fault(caught_by="parity", kind="structural", source="EasyDeL, pull request 231, its first version")
class FactorForgotten(DitMoe):
    """The factor multiplies weights that are not renormalized, and no others."""

    def weigh(self, chosen, config):
        return super().weigh(chosen, replace(config, routed_scaling_factor=1.0) if config.renormalize else config)


@fault(caught_by="parity", kind="structural", source="DeepSeek-V2's groups and DeepSeek-V3's")
class GroupsByTheirBestTwo(DitMoe):
    """A group's score is the sum of its two highest."""

    def gate(self):
        return GroupedRouter()


@fault(caught_by="parity", kind="structural")
class SharedExpertScaled(DitMoe):
    """The factor of the routed experts multiplies the shared one too."""

    def combine(self, routed, shared, config):
        return routed + config.routed_scaling_factor * shared


@fault(
    caught_by="parity",
    kind="precision",
    source="feizc/DiT-MoE models.py: a softmax of the model's dtype",
    dtypes=("bfloat16",),
)
class ScoresInLowPrecision(DitMoe):
    """Scores are rounded to bfloat16 before experts are chosen by them."""

    def scores(self, logits, config):
        return super().scores(logits, config).bfloat16().float()


@fault(caught_by="parity", kind="structural", source="seq_aux, which EasyDeL's port reads nowhere")
class LossOfTheBatchAlone(DitMoe):
    """The loss is that of the batch, whatever is asked for."""

    def loss(self, shares, ids, config):
        return super().loss(shares, ids, replace(config, per_sample=False))


@fault(caught_by="parity", kind="structural", source="load_balancing_loss_func of transformers, which divides by tokens alone")
class LossTopKTimes(DitMoe):
    """Assignments are divided by tokens, of which each makes top_k."""

    def choices(self, ids):
        return 1


@fault(caught_by="parity", kind="structural")
class SigmoidsNotDivided(DitMoe):
    """The loss takes sigmoids for parts of a whole."""

    def shares(self, scores):
        return scores


@fault(caught_by="gradients", kind="gradient", source="feizc/DiT-MoE models.py, moe_infer under no_grad")
class RoutedPartWithoutGradient(DitMoe):
    """Nothing flows back through the routed experts."""

    def routed(self, *inputs):
        return super().routed(*(each.detach() for each in inputs))


@fault(caught_by="gradients", kind="gradient", source="EasyDeL, pull request 231, which has no loss at all")
class LossWithoutGradient(DitMoe):
    """The loss is reported, and nothing flows back."""

    def loss(self, shares, ids, config):
        return super().loss(shares.detach(), ids, config) + 0 * shares.sum()


@fault(caught_by="parity", kind="precision", dtypes=("bfloat16",))
class MeanInLowPrecision(DitMoe):
    """Parts are rounded to bfloat16 before their mean is taken."""

    def mean(self, shares):
        return super().mean(shares.bfloat16().float())
