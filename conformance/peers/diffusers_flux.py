"""diffusers' FluxTransformer2DModel on trial; imported only where diffusers is installed."""

import functools
from dataclasses import asdict
from typing import Any

from diffusers import FluxTransformer2DModel
from torch.func import functional_call

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import with_buffers_alone
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.reference.configs import FluxConfig


@functools.cache
def model(config: FluxConfig) -> Any:
    """Of any parameters."""
    return with_buffers_alone(FluxTransformer2DModel, **asdict(config))


@peer("flux.flux", dtypes=DTYPES, right_in=("float32",), rounding="eager", oracle=True)
class DiffusersFlux:
    """FluxTransformer2DModel, which multiplies times and guidances by 1000 in the dtype of the tokens."""

    def __call__(
        self, state, hidden_states, encoder_hidden_states, pooled_projections, timesteps, guidance, img_ids, txt_ids, *, config
    ):
        given = hidden_states, encoder_hidden_states, pooled_projections, timesteps, img_ids, txt_ids
        guided = {"guidance": guidance} if config.guidance_embeds else {}
        return functional_call(model(config), state, given, guided).sample
