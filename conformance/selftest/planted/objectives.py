"""Bugs of objectives."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.objectives import FlowLoss, FlowMinSnr, Interpolate, Velocity

INTERPOLATE, VELOCITY, LOSS = (f"objectives.rectified_flow_{name}" for name in ("interpolate", "velocity", "loss"))


@fault(caught_by="parity", kind="structural", source="rectified flow's two conventions of time", smallest=1)
class DataAtTimeOne(Interpolate):
    """Data and noise are exchanged."""

    def mix(self, data, noise, times):
        return super().mix(noise, data, times)


@fault(caught_by="parity", kind="structural", source="variance-preserving schedules", smallest=1)
class RootsForShares(Interpolate):
    """The squares of both shares add up to 1, not the shares."""

    def mix(self, data, noise, times):
        return (1 - times).sqrt() * data + times.sqrt() * noise


@fault(caught_by="parity", kind="structural", smallest=2)
class OneTimeForTheBatch(Interpolate):
    """All examples go as far as the first."""

    def mix(self, data, noise, times):
        return super().mix(data, noise, times[:1])


@fault(caught_by="parity", kind="precision", source="times cast to the model's dtype", dtypes=("bfloat16",))
class TimesInBfloat16(Interpolate):
    """Times are rounded to bfloat16."""

    def mix(self, data, noise, times):
        return super().mix(data, noise, times.bfloat16().float())


@fault(caught_by="parity", kind="structural", source="EasyDeL, SD3", smallest=1)
class SignMixedUp(Velocity):
    """Each name stands for the other sign."""

    def difference(self, data, noise, velocity):
        return -super().difference(data, noise, velocity)


@fault(caught_by="parity", kind="structural", source="EasyDeL, SD3")
class SignIgnored(Velocity):
    """The velocity is noise − data, whatever is asked for."""

    def difference(self, data, noise, velocity):
        return noise - data


@fault(caught_by="parity", kind="structural", smallest=2)
class SquaresSummed(FlowLoss):
    """An example's loss grows with its size."""

    def mean(self, errors):
        return errors.square().flatten(1).sum(1)


@fault(caught_by="parity", kind="structural", source="huber losses of diffusion trainers", smallest=1)
class AbsoluteErrors(FlowLoss):
    """The mean of the errors' magnitudes."""

    def mean(self, errors):
        return errors.abs().flatten(1).mean(1)


@fault(caught_by="batch_invariance", kind="structural", smallest=2)
class MeanOfTheBatch(FlowLoss):
    """Each example gets the mean loss of all."""

    def mean(self, errors):
        return super().mean(errors).mean().repeat(len(errors))


@fault(caught_by="gradients", kind="gradient", source="targets under no_grad, and the data with them")
class ConstantTarget(FlowLoss):
    """No gradient reaches data and noise."""

    def difference(self, data, noise, velocity):
        return super().difference(data, noise, velocity).detach()


@fault(caught_by="parity", kind="precision", source="losses in the model's dtype", dtypes=("bfloat16",))
class ErrorsRounded(FlowLoss):
    """Errors are rounded to bfloat16 before they are squared."""

    def mean(self, errors):
        return super().mean(errors.bfloat16().float())


@fault(caught_by="parity", kind="structural", source="EasyDeL: min-SNR with the ratio upside down", dtypes=("float32",))
class RatioUpsideDown(FlowMinSnr):
    """Noise over data, whatever is asked for."""

    def consistent(self, data, noise, prediction_type, gamma):
        return self.coded(data, noise, gamma)


@fault(caught_by="parity", kind="structural", source="min-SNR weights of v for a flow's velocity", dtypes=("float32",))
class WeightOfVForFlows(FlowMinSnr):
    """A velocity is weighted as v is."""

    def consistent(self, data, noise, prediction_type, gamma):
        return super().consistent(data, noise, prediction_type.replace("flow_", "v_"), gamma)


@fault(caught_by="parity", kind="structural", source="SNR without its square", dtypes=("float32",))
class RatioNotSquared(FlowMinSnr):
    """The ratio of the deviations is compared with gamma."""

    def least(self, data, noise, gamma):
        return torch.minimum(data, gamma * noise) * noise
