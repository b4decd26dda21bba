"""Right but different hyper-connections."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.simulated.hyper_connections import Connections, HyperConnection
from gaugeblock.conformance.selftest.variant import right


class ConnectionsOfTorch(Connections):
    """torch's products and normalize."""

    def product(self, inputs, matrix):
        return inputs @ matrix

    def unit(self, vectors):
        return functional.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5

    def round(self, shares):
        return functional.normalize(functional.normalize(shares, p=1, dim=-2), p=1, dim=-1)


class Logarithms(Connections):
    """Rounds of log-sum-exp; shares are multiplied by streams as matrices."""

    def shares(self, scores):
        for _ in range(self.rounds()):
            scores = scores.log_softmax(-2).log_softmax(-1)
        return scores.exp()

    def mixed(self, shares, streams):
        return (shares.double().mT @ streams.double()).to(streams.dtype)


@right(batch_invariant=False)
class ConnectionOfTorch(ConnectionsOfTorch, HyperConnection):
    """torch's products and normalize in float32."""


@right()
class SinkhornOfLogarithms(Logarithms, HyperConnection):
    """Sinkhorn's rounds are of logarithms."""


@right(batch_invariant=False)
class ScaleFoldedIntoProducts(HyperConnection):
    """Streams are multiplied as they are, by matrices that the norm's scale is folded into, and divided by their norms then."""

    def connection(self, state, streams):
        scale = 1 + state["norm.gamma"]
        matrix = torch.cat([state["dynamic_alpha_fn"][0], state["dynamic_beta_fn"]], -1)
        squares = streams.square().sum(-1, keepdim=True).clamp(min=1e-24)
        products = self.product(streams, scale[:, None] * matrix) * (streams.shape[-1] / squares).sqrt()
        static = state["static_alpha"]
        read = torch.sigmoid(state["pre_branch_scale"] * products[..., 0] + static[:, 0])
        shares = self.shares(state["residual_scale"] * products[..., 1:-1] + static[:, 1:])
        beta = products[..., -1] * state["h_post_scale"] + state["static_beta"][:, 0, 0]
        return (read[..., None] * streams).sum(2), self.mixed(shares, streams), 2 * torch.sigmoid(beta)


@right(batch_invariant=False)
class ConnectionInFloat64(ConnectionsOfTorch, HyperConnection):
    """Everything in float64, rounded once."""

    def wide(self, array):
        return array.double()
