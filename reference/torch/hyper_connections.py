"""Manifold-constrained hyper-connections: how a branch reads and mixes several residual streams.

Shapes: B batch_size, S tokens, K residual streams, D hidden_size, L what is made of each stream of the read, one, and of the K
that they become.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch.precision import at_least_float32

SMALLEST_NORM = 1e-12  # what vectors are divided by at least
SINKHORN_ROUNDS = 20

State = Mapping[str, torch.Tensor]


def hyper_connection(state: State, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what a branch reads of a token's streams, how they are mixed, and how its result is written to them.

        n = x / |x| * sqrt(hidden_size) * (1 + norm.gamma), of each stream
        read = sum over s of sigmoid(pre_branch_scale * n_s alpha_0 + static_alpha_s0) * x_s
        mixed_t = sum over s of doubly_stochastic(residual_scale * n alpha_1.. + static_alpha)_st * x_s
        write_s = 2 * sigmoid(h_post_scale * n_s beta + static_beta_s)

    The streams become mixed_s + write_s * branch(read).

    Args:
        state: The parameters by name, shapes as in `reference.states.connection_shapes`, dtype of streams.
        streams: [batch_size, num_tokens, num_streams, hidden_size], floating.

    Returns:
        read: [batch_size, num_tokens, hidden_size], dtype of streams; computed in float32 (float64 for float64 streams) and
            rounded once.
        mixed: [batch_size, num_tokens, num_streams, hidden_size], as read.
        write: [batch_size, num_tokens, num_streams], float32 (float64 for float64 streams).

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; a rank or a device is wrong, or there is no
            stream or no feature.

    Source: Xie et al. 2025 (arXiv:2512.24880), section 4; Zhu et al. 2024 (arXiv:2409.19606), algorithm 2; hyper-connections
    0.4.11 (PyPI), mHCv2.py, whose coefficients are of each stream's numbers, not of all streams'.
    """
    validation.hyper_connection(state, streams)
    wide = {name: at_least_float32(parameter) for name, parameter in state.items()}
    read_BSD, mixed_BSKD, write_BSK = connection(wide, at_least_float32(streams))
    return read_BSD.to(streams.dtype), mixed_BSKD.to(streams.dtype), write_BSK


def connection(state: State, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `hyper_connection` does, in the dtype of the streams; nothing is checked."""
    normalized_BSKD = divided_by_norm(streams) * (1 + state["norm.gamma"])
    alpha_BSKL = normalized_BSKD @ state["dynamic_alpha_fn"][0]  # the first of L is what is read
    read_BSK = torch.sigmoid(state["pre_branch_scale"] * alpha_BSKL[..., 0] + state["static_alpha"][:, 0])
    mix_BSKL = doubly_stochastic(state["residual_scale"] * alpha_BSKL[..., 1:] + state["static_alpha"][:, 1:])
    beta_BSK1 = state["h_post_scale"] * (normalized_BSKD @ state["dynamic_beta_fn"]) + state["static_beta"][:, 0]
    read_BSD = (read_BSK[..., None] * streams).sum(dim=2)
    return read_BSD, mix_BSKL.mT @ streams, 2 * torch.sigmoid(beta_BSK1[..., 0])


def divided_by_norm(vectors: torch.Tensor) -> torch.Tensor:
    """Bring the last axis to a root mean square of 1; one that is 0 stays so."""
    squares = (vectors * vectors).sum(dim=-1, keepdim=True)
    # of squares, since a norm has no gradient at 0
    return vectors * torch.rsqrt(squares.clamp(min=SMALLEST_NORM**2)) * vectors.shape[-1] ** 0.5


def doubly_stochastic(scores: torch.Tensor) -> torch.Tensor:
    """Return shares [..., K, L], exp(scores) of which each column, then each row, is divided by its sum, many times.

    Source: Sinkhorn and Knopp 1967. In logarithms no sum is 0; hyper-connections divides by 1e-12 at least.
    """
    for _ in range(SINKHORN_ROUNDS):
        scores = scores.log_softmax(dim=-2).log_softmax(dim=-1)
    return scores.exp()
