"""Bugs of DiT-MoE ports, but for those of its layer."""

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.planted import dit_moe_layers
from gaugeblock.conformance.selftest.simulated.dit_moe import DitMoeModel
from gaugeblock.conformance.selftest.simulated.dit_moe_layers import DitMoe


@fault(caught_by="parity", kind="structural", source="samplers that tell a model t in [0, 1]")
class ScaleOfTimesForgotten(DitMoeModel):
    """Times are embedded as they come."""

    def scaled(self, timesteps, config):
        return timesteps


@fault(caught_by="parity", kind="structural", source="rectified flow: t enters the public model unscaled")
class TimesAlwaysTimesAThousand(DitMoeModel):
    """Times are multiplied by 1000, whatever is asked for."""

    def scaled(self, timesteps, config):
        return 1000 * timesteps


@fault(caught_by="parity", kind="structural")
class LossOfTheLastLayer(DitMoeModel):
    """The loss of one layer overwrites that of the layers before."""

    def total(self, losses):
        return losses[-1]


@fault(caught_by="parity", kind="structural")
class MeanOfTheLosses(DitMoeModel):
    """Losses are averaged over the layers."""

    def total(self, losses):
        return super().total(losses) / len(losses)


@fault(caught_by="same_pointer_new_data", kind="state", source="losses collected in a global list, as Megatron's tracker is")
class LossesOfCallsBefore(DitMoeModel):
    """Losses are collected, and the list is never emptied."""

    def __init__(self):
        self.all = []

    def total(self, losses):
        self.all += [each.detach() for each in losses]
        return super().total(losses) + sum(self.all[: -len(losses)])


@fault(caught_by="gradients", kind="gradient", source="EasyDeL, pull request 231, which has no loss at all")
class LossesDetached(DitMoeModel):
    """The losses are reported, and nothing flows back."""

    def total(self, losses):
        return super().total(losses).detach() + 0 * losses[0]


@fault(caught_by="gradients", kind="gradient", source="feizc/DiT-MoE models.py, moe_infer under no_grad")
class RoutedPartsWithoutGradient(DitMoeModel):
    """Nothing flows back through the routed experts."""

    def layer(self):
        return dit_moe_layers.RoutedPartWithoutGradient()


@fault(caught_by="parity", kind="structural", source="EasyDeL, pull request 231: what its base class makes of the gate's logits")
class WeightsRenormalized(DitMoeModel):
    """Weights are divided by their sum."""

    def layer(self):
        return dit_moe_layers.AlwaysRenormalized()


class _WithoutShared(DitMoe):
    def combine(self, routed, shared, config):
        return routed


@fault(caught_by="parity", kind="structural")
class SharedExpertForgotten(DitMoeModel):
    """Only the routed experts run."""

    def layer(self):
        return _WithoutShared()


@fault(caught_by="parity", kind="structural", source="EasyDeL, pull request 231: first_k_dense_replace, moe_layer_freq")
class FirstLayerDense(DitMoeModel):
    """The first layer has its shared expert alone, and no loss."""

    def feed_forward(self, state, modulated, config):
        out = super().feed_forward(state, modulated, config)
        if len(self.losses) > 1:
            return out
        self.losses[0] = 0 * self.losses[0]
        return (
            DitMoe()
            .shared(modulated.flatten(0, 1), {name.removeprefix("moe."): each for name, each in state.items()})
            .view(modulated.shape)
        )


@fault(caught_by="parity", kind="structural", source="layers that share a module by mistake: [gate] * depth")
class OneGateForAllLayers(DitMoeModel):
    """All layers choose by the gate of the first."""

    def feed_forward(self, state, modulated, config):
        if not self.losses:
            self.gate = state["moe.gate.weight"]
        return super().feed_forward({**state, "moe.gate.weight": self.gate}, modulated, config)


@fault(caught_by="parity", kind="structural", source="checkpoints of the public train.py, which has no QK norm")
class QkNormForgotten(DitMoeModel):
    """Queries and keys are taken as they are."""

    def qk_norm(self, state, name, heads):
        return heads + 0 * super().qk_norm(state, name, heads)


@fault(caught_by="parity", kind="structural")
class OneNormForBoth(DitMoeModel):
    """Keys pass the norm of the queries."""

    def qk_norm(self, state, name, heads):
        return super().qk_norm(state, "q_norm", heads)


@fault(caught_by="parity", kind="structural", source="QK norms of other models: RMSNorm")
class RootMeanSquareOfHeads(DitMoeModel):
    """Queries and keys are divided by their root mean square, and their mean stays."""

    def qk_norm(self, state, name, heads):
        normalized = heads * (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return normalized * state[f"attn.{name}.weight"] + state[f"attn.{name}.bias"]


@fault(caught_by="parity", kind="precision", source="train_deepspeed.py, sample.py: flash attention in float16")
class AttentionInHalfPrecision(DitMoeModel):
    """Queries, keys and values are rounded to float16."""

    def heads(self, qkv, num_heads):
        return tuple(each.half().float() for each in super().heads(qkv, num_heads))
