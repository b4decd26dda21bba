"""Hyper-connections, simulated: each step can be overridden, alone and inside of the text-latent MMDiT."""

from collections.abc import Mapping

import torch

from gaugeblock.reference import validation

State = Mapping[str, torch.Tensor]


class Connections:
    """What all connections compute."""

    def connection(self, state: State, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is read, the mixed streams, and how strongly each is written to, `[B, S, K]`."""
        normalized = self.unit(streams) * self.connection_scale(state["norm.gamma"])
        alpha, static = self.product(normalized, state["dynamic_alpha_fn"][0]), state["static_alpha"]
        read = self.to_read(state["pre_branch_scale"] * alpha[..., 0] + static[:, 0])
        shares = self.shares(state["residual_scale"] * alpha[..., 1:] + static[:, 1:])
        beta = self.product(normalized, state["dynamic_beta_fn"])[..., 0] * state["h_post_scale"]
        strength = self.to_write(beta + state["static_beta"][:, 0, 0])
        return (read[..., None] * streams).sum(2), self.mixed(shares, streams), strength

    def connection_scale(self, gamma: torch.Tensor) -> torch.Tensor:
        """1 more."""
        return 1 + gamma

    def to_read(self, scores: torch.Tensor) -> torch.Tensor:
        """Between 0 and 1."""
        return torch.sigmoid(scores)

    def to_write(self, scores: torch.Tensor) -> torch.Tensor:
        """Between 0 and 2."""
        return 2 * torch.sigmoid(scores)

    def shares(self, scores: torch.Tensor) -> torch.Tensor:
        """Twenty rounds, columns first, `[B, S, K, K]`."""
        shares = torch.exp(scores - scores.amax(-2, keepdim=True).detach())
        for _ in range(self.rounds()):
            shares = self.round(shares)
        return shares

    def rounds(self) -> int:
        """How many."""
        return 20

    def round(self, shares: torch.Tensor) -> torch.Tensor:
        """Each column, then each row, sums up to 1."""
        shares = shares / shares.sum(-2, keepdim=True).clamp(min=1e-12)
        return shares / shares.sum(-1, keepdim=True).clamp(min=1e-12)

    def mixed(self, shares: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
        """Column t is what stream t becomes."""
        return (shares[..., None] * streams[..., :, None, :]).sum(-3)

    def unit(self, vectors: torch.Tensor) -> torch.Tensor:
        """Of a root mean square of 1."""
        squares = vectors.double().square().sum(-1, keepdim=True).clamp(min=1e-24)
        return vectors * (self.unit_size(vectors.shape[-1]) * squares.rsqrt()).to(vectors.dtype)

    def unit_size(self, hidden_size: int) -> float:
        """Of what `unit` returns, as a vector."""
        return hidden_size**0.5

    def product(self, inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """With sums in float64."""
        return (inputs.double() @ matrix.double()).to(inputs.dtype)


class HyperConnection(Connections):
    """`hyper_connections.hyper_connection`."""

    contract = "hyper_connections.hyper_connection"

    def __call__(self, state: State, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        validation.hyper_connection(state, streams)
        read, mixed, strength = self.connection({name: self.wide(each) for name, each in state.items()}, self.wide(streams))
        return read.to(streams.dtype), mixed.to(streams.dtype), strength.float()

    def wide(self, array: torch.Tensor) -> torch.Tensor:
        """float32."""
        return array.float()
