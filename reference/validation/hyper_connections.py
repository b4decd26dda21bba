"""Calls of hyper-connections."""

from typing import Any

from gaugeblock.reference import states
from gaugeblock.reference.validation.arrays import FLOATING, require_dtype, require_shape, state_entries


def hyper_connection(state: Any, streams: Any) -> None:
    """Check the arguments of `hyper_connections.hyper_connection`."""
    require_dtype("streams", streams, FLOATING)
    require_shape("streams", streams, batch_size=None, num_tokens=None, num_streams=None, hidden_size=None)
    *_, num_streams, hidden_size = streams.shape
    for size, what in ((num_streams, "stream"), (hidden_size, "feature")):
        if not size:
            raise ValueError(f"streams must have one {what} at least, got {tuple(streams.shape)}")
    state_entries(state, states.connection_shapes(num_streams, hidden_size), like=streams)
