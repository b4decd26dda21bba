"""hyper-connections' connection on trial; imported only where hyper-connections is installed."""

import functools
from typing import Any

import torch
from hyper_connections.mHCv2 import ManifoldConstrainedHyperConnections
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import without_parameters
from gaugeblock.conformance.peers.peer import peer


class WidthConnection(torch.nn.Module):
    """What comes before a branch: strengths are theirs, without their axes of 1."""

    def __init__(self, num_streams: int, hidden_size: int) -> None:
        super().__init__()
        self.theirs = ManifoldConstrainedHyperConnections(num_streams, dim=hidden_size, layer_index=0)

    def forward(self, streams):
        read, mixed, strengths = self.theirs.width_connection(streams)
        return read, mixed, strengths["beta"][..., 0, 0].float()


@functools.cache
def module(num_streams: int, hidden_size: int) -> Any:
    """Of any parameters."""
    return without_parameters(WidthConnection, num_streams, hidden_size)


@peer("hyper_connections.hyper_connection", dtypes=DTYPES, right_in=("float32", "bfloat16"), rounding="eager", oracle=True)
class HyperConnectionsWidth:
    """ManifoldConstrainedHyperConnections.width_connection; in float16 a stream that is 0 is NaN."""

    def __call__(self, state, streams):
        parameters = {f"theirs.{name}": each for name, each in state.items()}
        return functional_call(module(*streams.shape[2:]), parameters, (streams,))
