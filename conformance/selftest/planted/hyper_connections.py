"""Bugs of ports of hyper-connections."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.hyper_connections import HyperConnection


@fault(caught_by="parity", kind="structural", source="mmdit 0.2.2: connections by softmax or tanh, no Sinkhorn")
class SoftmaxForSinkhorn(HyperConnection):
    """Shares are a softmax over the streams that are mixed, once."""

    def shares(self, scores):
        return scores.softmax(-2)


@fault(caught_by="parity", kind="structural", source="mmdit 0.2.2: unconstrained connections")
class SharesUnconstrained(HyperConnection):
    """Streams are mixed by the scores themselves."""

    def shares(self, scores):
        return scores


@fault(caught_by="parity", kind="boundary", source="sinkhorn_iters of other models")
class OneRound(HyperConnection):
    """One round is taken for enough."""

    def rounds(self):
        return 1


@fault(caught_by="parity", kind="boundary", source="Sinkhorn implementations that begin with rows")
class RowsFirst(HyperConnection):
    """Each round divides rows, then columns."""

    def shares(self, scores):
        return super().shares(scores.mT).mT


@fault(caught_by="parity", kind="structural", source="einsum with its axes exchanged: '... s t, ... t d -> ... s d'")
class MixedByRows(HyperConnection):
    """Row t, not column t, is what stream t becomes."""

    def mixed(self, shares, streams):
        return super().mixed(shares.mT, streams)


@fault(caught_by="parity", kind="structural", source="hyper-connections: gamma of its RMSNorm begins at 0")
class GammaWithoutOne(HyperConnection):
    """The connection's norm is multiplied by gamma, not by 1 + gamma."""

    def connection_scale(self, gamma):
        return gamma


@fault(caught_by="parity", kind="structural", source="mHC ports: H_post = sigmoid, without the 2")
class WrittenHalfAsMuch(HyperConnection):
    """Branches are written between 0 and 1 times."""

    def to_write(self, scores):
        return torch.sigmoid(scores)


@fault(caught_by="parity", kind="structural", source="hyper-connections of 2024, which read by tanh")
class ReadByTanh(HyperConnection):
    """What is read of a stream lies between -1 and 1 times it."""

    def to_read(self, scores):
        return torch.tanh(scores)


@fault(caught_by="parity", kind="structural", source="RMSNorm ports that normalize to length 1")
class WithoutTheRoot(HyperConnection):
    """Vectors are brought to length 1."""

    def unit_size(self, hidden_size):
        return 1.0


@fault(caught_by="gradients", kind="gradient", source="Sinkhorn rounds under no_grad, as routers have them")
class SharesDetached(HyperConnection):
    """How streams are mixed has no gradient."""

    def shares(self, scores):
        return super().shares(scores.detach()) + 0 * scores


@fault(caught_by="gradients", kind="gradient", source="the last round alone is differentiated, as of implicit layers")
class LastRoundAlone(HyperConnection):
    """Gradients flow through the last round alone."""

    def shares(self, scores):
        exact = super().shares(scores)
        short = self.round(torch.exp(scores - scores.amax(-2, keepdim=True).detach()))
        return exact.detach() + short - short.detach()


@fault(caught_by="parity", kind="structural", source="the paper's coefficients, of the numbers of all streams together")
class OneNormForAllStreams(HyperConnection):
    """All streams of a token are divided by their root mean square."""

    def unit(self, vectors):
        return super().unit(vectors.flatten(-2)).view(vectors.shape)


@fault(caught_by="parity", kind="boundary", source="F.normalize, whose eps of 1e-12 is left out")
class NoSmallestNorm(HyperConnection):
    """A stream that is 0 is divided by 0."""

    def unit(self, vectors):
        return vectors * vectors.shape[-1] ** 0.5 / vectors.norm(dim=-1, keepdim=True)


@fault(caught_by="layout", kind="memory", source="streams that begin as one that is repeated: expand, then view")
class StreamsTakenToBeContiguous(HyperConnection):
    """Streams are read as if they lay one behind the other."""

    def wide(self, array):
        return array.as_strided(array.shape, torch.empty(array.shape).stride()).float()
