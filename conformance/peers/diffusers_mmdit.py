"""diffusers' SD3Transformer2DModel on trial; imported only where diffusers is installed."""

import functools
from dataclasses import asdict
from typing import Any

from diffusers import SD3Transformer2DModel
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import MMDiTConfig


@functools.cache
def model(config: MMDiTConfig) -> Any:
    """Of any parameters."""
    return with_buffers_alone(SD3Transformer2DModel, **asdict(config))


@peer("mmdit.mmdit", dtypes=DTYPES, rounding="eager", oracle=True)
class DiffusersMmdit:
    """SD3Transformer2DModel, whose state has the same names."""

    def __call__(self, state, latents, encoder_hidden_states, pooled_projections, timesteps, *, config):
        inputs = latents, encoder_hidden_states, pooled_projections, timesteps
        return functional_call(model(config), dict(state), inputs).sample
